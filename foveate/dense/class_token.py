"""An artificial class token, for methods that read class attention on a ViT without one.

The SViT paper compares such methods on backbones of detectors, which have no class token. It puts
one in front of the patches and trains it with the detector.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from foveate.backbones import backbone_for, set_image_settings
from foveate.backbones.timm_vit import TimmViT, plain_vit, vit_arguments
from foveate.core import ReducedViT

__all__ = ["with_class_token"]

_log = logging.getLogger(__name__)


def with_class_token(vit: nn.Module) -> nn.Module:
    """Return a copy of a ViT with a new class token, or the ViT itself if it has one.

    The token has no position, so all weights of the ViT stay as they were. It is untrained: until
    it is trained, a method that reads its attention decides by chance.

    Args:
        vit: a plain ``VisionTransformer`` of timm; apply the method to the returned model.
    """
    if isinstance(vit, ReducedViT):
        raise ValueError(
            f"add the class token to the plain ViT first, then apply {vit.reducer.name}"
        )
    backbone = backbone_for(vit)
    if backbone.spec.class_token:
        return vit
    if type(backbone) is not TimmViT:
        raise ValueError(
            f"a class token can only be added to timm's VisionTransformer, got a "
            f"{type(vit).__name__}"
        )
    arguments = vit_arguments(vit)
    if arguments["reg_tokens"] and not arguments["no_embed_class"]:
        raise ValueError(
            "the registers of this ViT have positions, so a class token without one cannot be added"
        )
    made: Any = plain_vit(**{**arguments, "class_token": True, "no_embed_class": True})
    missing, unknown = made.load_state_dict(vit.state_dict(), strict=False)
    if missing != ["cls_token"] or unknown:
        raise ValueError(
            f"{type(vit).__name__} cannot be copied: it differs from a plain ViT in these parts: "
            f"{', '.join([*missing, *unknown])}"
        )
    set_image_settings(made, getattr(vit, "pretrained_cfg", None) or {})
    like = next(vit.parameters())
    _log.warning("added a class token, which says nothing about an image until it is trained")
    found: nn.Module = made.to(device=like.device, dtype=like.dtype).train(vit.training)
    return found
