"""Model families: one file each, the only places that know a model class."""

from __future__ import annotations

from torch import nn

from foveate.backbones.timm_eva import TimmEva
from foveate.backbones.timm_vit import TimmViT
from foveate.core import Backbone

__all__ = ["FAMILIES", "TimmEva", "TimmViT", "backbone_for"]

FAMILIES: tuple[type[Backbone], ...] = (TimmViT, TimmEva)


def backbone_for(model: nn.Module) -> Backbone:
    """Find the family of a model; ValueError naming what is supported where there is none."""
    from foveate.backbones._timm import refuse

    for family in FAMILIES:
        if family.accepts(model):
            return family(model)  # type: ignore[call-arg]
    raise refuse(model, "an architecture that is not a plain ViT")
