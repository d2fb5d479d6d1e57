"""Pre-training by masked image modelling: MAE and SimMIM, with masked token optimisation."""

from foveate.mim.mae import Mae
from foveate.mim.masks import Hiding, Mask
from foveate.mim.method import (
    MaskedImageModel,
    Prediction,
    States,
    make_method,
    register,
)
from foveate.mim.mto import Mto, mto_losses
from foveate.mim.simmim import Simmim

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
