"""What all model families share: refusing, patch grids, comparing models, averaged keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "image_settings",
    "key_average",
    "patch_grid",
    "refuse",
    "same_modules",
    "set_image_settings",
]


def refuse(model: nn.Module, what: str) -> ValueError:
    """The error for a model that cannot be driven: names it and says what can."""
    return ValueError(
        f"{type(model).__name__} with {what} cannot be driven. Supported are plain pre-norm "
        "vision transformers with global attention: timm VisionTransformer (ViT, DeiT, DeiT-III, "
        "DINOv2, CLIP, SigLIP, MAE) and timm Eva (EVA-02, DINOv3, rotary ViTs), LV-ViT, and of "
        "Hugging Face transformers ViT, DeiT, DINOv2 (with and without registers) and the vision "
        "models of CLIP and SigLIP"
    )


def patch_grid(images: Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns of images; ValueError where the patch does not divide them."""
    height, width = images.shape[-2:]
    for name, size, side in zip(("height", "width"), (height, width), patch, strict=True):
        if size % side or size == 0:
            raise ValueError(
                f"image {name} {size} is not a multiple of the patch's {side}; "
                f"the nearest that are: {max(1, size // side) * side} and "
                f"{(size // side + 1) * side}"
            )
    return height // patch[0], width // patch[1]


def same_modules(model: nn.Module, twin: nn.Module) -> bool:
    """Whether two models have the same layers, sizes and settings, whatever their weights."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    heads = [_head_count(module) for module in model.modules()]
    return (
        str(model) == str(twin)  # names every layer with its eps, rates and activations
        and shapes == {key: value.shape for key, value in twin.state_dict().items()}
        and heads == [_head_count(module) for module in twin.modules()]
    )


def _head_count(module: nn.Module) -> int | None:
    return getattr(module, "num_heads", getattr(module, "num_attention_heads", None))


def key_average(
    layer: nn.Module, y: Tensor, heads: int, part: int = 0, parts: int = 1
) -> Tensor | None:
    """Keys averaged over heads ``[T, d]`` by one thin product with the averaged weights.

    None where an adapter or a hook makes the keys differ from what the layer's own weights give.

    Args:
        layer: the projection that makes the keys.
        y: what it is given, ``[T, C]``.
        heads: number of heads.
        part: which part of the layer's output the keys are.
        parts: how many it has: 3 where one layer makes queries, keys and values.
    """
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    weight = layer.weight.view(parts, heads, -1, layer.in_features)[part].mean(0)  # [d, C]
    bias = None if layer.bias is None else layer.bias.view(parts, heads, -1)[part].mean(0)
    return F.linear(y, weight, bias)


# What timm's models say of their images, besides the size, which their patches know.
_IMAGE_KEYS = ("mean", "std", "crop_pct", "interpolation")


def image_settings(model: nn.Module) -> dict[str, Any]:
    """How a timm model wants its images prepared, as far as it says so; plain data."""
    config = getattr(model, "pretrained_cfg", None) or {}
    found = {key: config[key] for key in _IMAGE_KEYS if config.get(key) is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def set_image_settings(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Say it where timm's models do; what is not named stays."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    config |= {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    vars(model)["pretrained_cfg"] = config
