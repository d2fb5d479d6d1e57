"""Pre-training by masked image modelling: MAE, SimMIM, BootMAE and ConMIM, with MTO."""

from foveate.mim.bootmae import BootMAE
from foveate.mim.conmim import ConMIM
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
from foveate.mim.teacher import TaughtModel

__all__ = [
    "BootMAE",
    "ConMIM",
    "Mae",
    "Mask",
    "MaskedImageModel",
    "Hiding",
    "Mto",
    "Prediction",
    "Simmim",
    "States",
    "TaughtModel",
    "make_method",
    "mto_losses",
    "register",
]
