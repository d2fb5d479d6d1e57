"""Pre-training by masked image modelling: MAE and SimMIM, with masked token optimisation."""

from foveate.pretrain.mae import Mae
from foveate.pretrain.masks import Hiding, Mask
from foveate.pretrain.method import (
    MaskedImageModel,
    Prediction,
    States,
    make_method,
    register,
)
from foveate.pretrain.mto import Mto, mto_losses
from foveate.pretrain.simmim import Simmim

__all__ = [
    "Mae",
    "Mask",
    "MaskedImageModel",
    "Hiding",
    "Mto",
    "Prediction",
    "Simmim",
    "States",
    "make_method",
    "mto_losses",
    "register",
]
