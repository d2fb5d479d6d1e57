"""The reduction methods, one file each. Importing this package registers them all."""

from foveate.methods.atm import ATM
from foveate.methods.ats import ATS
from foveate.methods.attention import Attention
from foveate.methods.cropr import Cropr
from foveate.methods.dynamicvit import DynamicViT
from foveate.methods.evit import EViT
from foveate.methods.evovit import EvoViT
from foveate.methods.pitome import PiToMe
from foveate.methods.random import Random
from foveate.methods.spvit import SPViT
from foveate.methods.static import Static
from foveate.methods.structural import Structural
from foveate.methods.svit import SViT
from foveate.methods.tokenmergence import TokenMergence
from foveate.methods.tome import ToMe

__all__ = [
    "ATM",
    "ATS",
    "Attention",
    "Cropr",
    "DynamicViT",
    "EViT",
    "EvoViT",
    "PiToMe",
    "Random",
    "SPViT",
    "SViT",
    "Static",
    "Structural",
    "ToMe",
    "TokenMergence",
]
