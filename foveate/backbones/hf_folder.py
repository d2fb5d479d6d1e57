"""Load folders that Hugging Face's ``save_pretrained`` wrote, without fetching or running code."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from foveate.backbones._hf import HfBackbone, library_class
from foveate.backbones._shared import folder_settings, set_image_settings
from foveate.backbones.hf_clip import HfClip
from foveate.backbones.hf_dinov2 import HfDinov2
from foveate.backbones.hf_siglip import HfSiglip
from foveate.backbones.hf_vit import HfViT
from foveate.files import read_json

__all__ = ["HF_FAMILIES", "check_folder", "from_folder"]

HF_FAMILIES: tuple[type[HfBackbone], ...] = (HfViT, HfDinov2, HfClip, HfSiglip)

_log = logging.getLogger(__name__)
_CONFIG = "config.json"

# Of a model of images and texts, only the vision half is loaded. A configuration that names no
# class means the encoder of its model type.
_HALVES = {"CLIPModel": "CLIPVisionModel", "SiglipModel": "SiglipVisionModel"}
_BY_TYPE = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}


def from_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """Load a model from a folder of ``config.json`` and ``model.safetensors``, for evaluation.

    ValueError says if the folder is not one of these, if its model cannot be driven, or if its
    weights are missing, damaged or do not fit.
    """
    folder = Path(folder)
    config = _config(folder)
    name = _class_name(folder, config)
    kind = library_class(name)
    model, missing = _load(folder, kind)
    if missing and all(key.startswith("pooler.") for key in missing):
        # Pre-trained weights often lack the pooler; then the model is made without one.
        model, missing = _load(folder, kind, add_pooling_layer=False)
    if missing:
        raise ValueError(
            f"{folder}: weights of {len(missing)} parameters of {name} are missing, such as "
            f"{sorted(missing)[0]}"
        )
    set_image_settings(model, folder_settings(folder))  # so that the folder may move
    return model.eval()


def check_folder(folder: Path) -> None:
    """Refuse a folder whose model cannot be driven, before its weights are needed."""
    _class_name(folder, _config(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    absent = f"{folder} holds no {_CONFIG}: not a folder that save_pretrained wrote"
    config = read_json(path, absent)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a model")
    if "quantization_config" in config:
        raise ValueError(f"{folder} holds quantised weights, which are not supported")
    return config


def _class_name(folder: Path, config: dict[str, Any]) -> str:
    """Return the class to load: the first named one that can be driven."""
    known = [name for family in HF_FAMILIES for name in family.forms]
    named = config.get("architectures") or []
    for name in named:
        name = _HALVES.get(name, name)
        if name in known:
            return name
    kind = config.get("model_type")
    if not named and kind in _BY_TYPE:
        return _BY_TYPE[kind]
    found = ", ".join(map(str, named)) or f"a model of type {kind!r}"
    raise ValueError(f"{folder} holds {found}; supported are {', '.join(known)}")


def _load(folder: Path, kind: Any, **arguments: Any) -> tuple[Any, set[str]]:
    """Return the model, and the names of parameters that the folder has no weights for."""
    try:
        model, report = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:  # transformers and safetensors raise errors of many kinds
        raise ValueError(
            f"{folder}: the weights cannot be read: {' '.join(str(error).split())}"
        ) from error
    _log.debug("%s: weights that %s does not use: %s", folder, kind, report["unexpected_keys"])
    return model, set(report["missing_keys"])
