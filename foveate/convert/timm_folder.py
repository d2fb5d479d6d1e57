"""Load folders of plain models that timm's ``save_for_hf`` or ``push_to_hf_hub`` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from foveate.files import read_json

__all__ = ["WEIGHTS", "check_timm_folder", "from_timm_folder", "is_timm_folder"]

WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


def is_timm_folder(folder: Path) -> bool:
    """Tell a folder of timm's from one of transformers', which has a ``config.json`` too."""
    return "architecture" in _config(folder)


def check_timm_folder(folder: Path) -> None:
    """Refuse a folder whose model this timm does not know, before its weights are needed."""
    name = _config(folder)["architecture"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"{folder} holds {name!r}, which this timm {timm.__version__} lacks")


def from_timm_folder(folder: Path) -> nn.Module:
    """Load a model from a folder of ``config.json`` and ``model.safetensors``."""
    check_timm_folder(folder)
    # Without this file timm would look for pickles.
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: weights are read only in that format")
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm and safetensors raise errors of many kinds
        raise ValueError(
            f"{folder}: the weights cannot be read: {' '.join(str(error).split())}"
        ) from error


def _config(folder: Path) -> Mapping[str, Any]:
    found = read_json(folder / _CONFIG, f"{folder} holds no {_CONFIG}")
    if not isinstance(found, dict):
        raise ValueError(f"{folder / _CONFIG} is not the configuration of a model")
    return found
