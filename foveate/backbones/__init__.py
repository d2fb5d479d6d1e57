"""The model families. Each has one file, and only these files know model classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from foveate.backbones._shared import (
    SUPPORTED,
    image_settings,
    named_classes,
    refuse,
    set_image_settings,
    set_named_classes,
)
from foveate.backbones.hf_clip import HfClip
from foveate.backbones.hf_dinov2 import HfDinov2
from foveate.backbones.hf_folder import HF_FAMILIES, check_folder, from_folder
from foveate.backbones.hf_positions import resize_positions
from foveate.backbones.hf_siglip import HfSiglip
from foveate.backbones.hf_vit import HfViT
from foveate.backbones.lvvit import LVViT, LVViTBackbone, lvvit_m, lvvit_s
from foveate.backbones.multiscale import MultiScaleBackbone, MultiScaleViT, Scales, multiscale
from foveate.backbones.timm_beit import (
    TimmBeit,
    expand_position_bias,
    shared_position_bias,
)
from foveate.backbones.timm_eva import TimmEva
from foveate.backbones.timm_vit import TimmViT, plain_vit
from foveate.core import Backbone, ReducedViT
from foveate.registry import suggest

__all__ = [
    "FAMILIES",
    "SUPPORTED",
    "HfClip",
    "HfDinov2",
    "HfSiglip",
    "HfViT",
    "LVViT",
    "LVViTBackbone",
    "MultiScaleBackbone",
    "MultiScaleViT",
    "Scales",
    "TimmBeit",
    "TimmEva",
    "TimmViT",
    "backbone_for",
    "backbone_of",
    "check_folder",
    "class_names",
    "expand_position_bias",
    "from_folder",
    "image_settings",
    "lvvit_m",
    "lvvit_s",
    "multiscale",
    "plain_vit",
    "rebuild",
    "resize_positions",
    "set_class_names",
    "set_image_settings",
    "shared_position_bias",
]

# The order matters: LV-ViTs and multi-scale ViTs are timm VisionTransformers too.
FAMILIES: tuple[type[Backbone], ...] = (
    LVViTBackbone,
    MultiScaleBackbone,
    TimmViT,
    TimmEva,
    TimmBeit,
    *HF_FAMILIES,
)


def backbone_for(model: nn.Module) -> Backbone:
    """Find the family of a model and return its parts; ValueError if no family accepts it."""
    for family in FAMILIES:
        if family.accepts(model):
            return family(model)  # type: ignore[call-arg]
    raise refuse(model, "an architecture that is not a plain ViT")


def rebuild(family: str, recipe: Mapping[str, Any]) -> nn.Module:
    """Make a model from its family's recipe (``Backbone.recipe``), without its weights."""
    for known in FAMILIES:
        if known.family == family:
            return known.rebuild(recipe)
    raise ValueError(suggest("model family", family, [known.family for known in FAMILIES]))


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a model's classes, in the order of its outputs; None if it has none.

    If the number of names differs from the number of outputs, the head was replaced and the names
    do not count.
    """
    backbone = backbone_of(model)
    found = named_classes(backbone.model)
    return found if len(found) == backbone.spec.classes > 0 else None


def set_class_names(model: nn.Module, names: Sequence[str]) -> None:
    """Set the names of a model's classes where its library keeps them, so that they are saved too.

    Args:
        model: a plain model or one from ``foveate.apply``.
        names: one name for each output, in the order of the outputs.
    """
    backbone = backbone_of(model)
    if len(names) != backbone.spec.classes:
        raise ValueError(
            f"a model with {backbone.spec.classes} outputs needs {backbone.spec.classes} class "
            f"names, got {len(names)}"
        )
    set_named_classes(backbone.model, tuple(map(str, names)))


def backbone_of(model: nn.Module) -> Backbone:
    """Return the parts of a model, plain or from ``foveate.apply``."""
    return model.backbone if isinstance(model, ReducedViT) else backbone_for(model)
