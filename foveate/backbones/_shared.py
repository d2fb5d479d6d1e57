"""Helpers of all model families: refuse and compare models, read and set what they state."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from foveate.core.hooks import is_sharded
from foveate.files import read_json

__all__ = [
    "SUPPORTED",
    "check_class",
    "folder_settings",
    "image_settings",
    "named_classes",
    "patch_grid",
    "plain_class",
    "refuse",
    "same_modules",
    "set_image_settings",
    "set_named_classes",
]

SUPPORTED = "foveate supports plain pre-norm vision transformers with global attention"


def refuse(model: nn.Module, what: str) -> ValueError:
    """Make the error for a model that cannot be driven; it says which models can."""
    return ValueError(
        f"{type(model).__name__} with {what} cannot be driven. {SUPPORTED}: timm "
        "VisionTransformer (ViT, DeiT, DeiT-III, DINOv2, CLIP, SigLIP, MAE) and Eva (EVA-02, "
        "DINOv3, rotary ViTs), LV-ViT, multi-scale ViTs, and from Hugging Face transformers ViT, "
        "DeiT, DINOv2 (with and without registers) and the vision models of CLIP and SigLIP"
    )


def patch_grid(images: Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """Return patch rows and columns of images; ValueError where the patch does not divide them."""
    # Plain numbers give one graph for each image size, as in ``Schedule.count``.
    height, width = (operator.index(side) for side in images.shape[-2:])
    for name, size, side in zip(("height", "width"), (height, width), patch, strict=True):
        if size % side or size == 0:
            raise ValueError(
                f"image {name} {size} is not a multiple of the patch's {side}; "
                f"the nearest multiples are {max(1, size // side) * side} and "
                f"{(size // side + 1) * side}"
            )
    return height // patch[0], width // patch[1]


def same_modules(model: nn.Module, twin: nn.Module) -> bool:
    """Tell whether two models have the same layers, sizes and settings, whatever their weights.

    Stochastic depth may differ: it is a setting of training, and does nothing afterwards.
    """
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    heads = [_head_count(module) for module in model.modules()]
    return (
        _layers(model) == _layers(twin)
        and shapes == {key: value.shape for key, value in twin.state_dict().items()}
        and heads == [_head_count(module) for module in twin.modules()]
    )


def _layers(model: nn.Module) -> str:
    """Describe every layer with its eps, rates and activations, but without DropPath."""
    return re.sub(r"DropPath\(.*?\)", "Identity()", str(model))


def _head_count(module: nn.Module) -> int | None:
    return getattr(module, "num_heads", getattr(module, "num_attention_heads", None))


def plain_class(module: nn.Module) -> type:
    """Return a module's class; for a sharded module, the class before ``fully_shard``."""
    kind = type(module)
    if is_sharded(module):
        return kind.__mro__[2]  # fully_shard puts a class of its own and FSDPModule in front
    return kind


# Names that a subclass may define and still compute what its base computes.
_CONSTRUCTION = {
    *("__init__", "__new__", "__init_subclass__", "init_weights", "_init_weights"),
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__"),
    *("__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__firstlineno__", "__static_attributes__", "__orig_bases__", "__parameters__"),
}


def check_class(model: nn.Module, *stock: type) -> None:
    """Refuse a model unless its class is a stock one, or a subclass that only constructs it."""
    kind = plain_class(model)
    base = next((one for one in kind.__mro__ if one in stock), None)
    if base is None:
        raise refuse(model, "a class of its own")
    own = {name for one in kind.__mro__ if one not in base.__mro__ for name in vars(one)}
    # A class attribute hides a submodule of the same name, so it counts as overriding it.
    held = {*vars(model), *model._modules, *model._parameters, *model._buffers}
    changed = sorted(n for n in own - _CONSTRUCTION if n in held or hasattr(base, n))
    if changed:
        raise refuse(model, f"a class of its own, which overrides {', '.join(changed[:3])},")


# Preprocessing settings of timm models; the size comes from the patches.
_IMAGE_KEYS = ("mean", "std", "crop_pct", "interpolation")


def image_settings(model: nn.Module) -> dict[str, Any]:
    """Return the preprocessing settings that a model or its folder states, as plain data."""
    stated = getattr(model, "pretrained_cfg", None) or {}
    config: Any = getattr(model, "config", None)
    if not stated and hasattr(config, "model_type"):  # a model of transformers
        stated = folder_settings(getattr(config, "_name_or_path", ""))
    found = {key: stated[key] for key in _IMAGE_KEYS if stated.get(key) is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def folder_settings(folder: str | Path) -> dict[str, Any]:
    """Return the preprocessing settings of a Hugging Face folder, under timm's names."""
    # Most processors that do not crop stretch images to the size, so nothing is cut off.
    settings: dict[str, Any] = {"crop_pct": 1.0}
    path = Path(folder) / "preprocessor_config.json"
    if not str(folder) or not path.is_file():
        return settings
    said = read_json(path, f"{path} does not exist")
    if not isinstance(said, dict):
        raise ValueError(f"{path} is not the configuration of an image processor")
    try:
        if "image_mean" in said and "image_std" in said:
            settings |= {"mean": list(said["image_mean"]), "std": list(said["image_std"])}
        if "resample" in said:
            settings["interpolation"] = Image.Resampling(said["resample"]).name.lower()
        if said.get("do_center_crop"):
            settings["crop_pct"] = min(1.0, _side(said["crop_size"]) / _side(said["size"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say how images are prepared: {error!r}") from error
    return settings


def _side(size: Any) -> float:
    """Return the shorter side of a size, which processors write in several forms."""
    if not isinstance(size, dict):
        return float(size)
    return float(size["shortest_edge"] if "shortest_edge" in size else min(size.values()))


def set_image_settings(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Set preprocessing settings where timm's models keep them; settings not given stay."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    config |= {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    vars(model)["pretrained_cfg"] = config


def named_classes(model: nn.Module) -> tuple[str, ...]:
    """Return the class names that a model carries, whatever its head; empty if there are none.

    timm keeps them in ``pretrained_cfg``, with descriptions if the names are mere codes, and
    transformers in ``config.id2label``.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "model_type"):
        names = tuple(str(config.id2label.get(n)) for n in range(len(config.id2label)))
        unnamed = tuple(f"LABEL_{n}" for n in range(len(names)))  # transformers' own default
        return () if names == unnamed else names
    stated = getattr(model, "pretrained_cfg", None) or {}
    names, descriptions = stated.get("label_names") or (), stated.get("label_descriptions") or {}
    return tuple(str(descriptions.get(name, name)) for name in names)


def set_named_classes(model: nn.Module, names: tuple[str, ...]) -> None:
    """Put class names where ``named_classes`` finds them."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "model_type"):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        return
    stated = dict(getattr(model, "pretrained_cfg", None) or {})
    stated.pop("label_descriptions", None)  # they describe the old names
    vars(model)["pretrained_cfg"] = {**stated, "label_names": names}
