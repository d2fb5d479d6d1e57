"""What the folders of reduced models and of dense ones have in common."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

__all__ = ["plain_options", "read_tensors", "version"]


def version() -> str:
    """Return the version of foveate that writes a folder."""
    try:
        return importlib.metadata.version("foveate")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+source"


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON gives them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError where it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
