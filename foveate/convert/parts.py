"""Helpers for the folders of reduced models, detectors and segmenters."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from foveate.core import Chain, Reducer
from foveate.files import read_json
from foveate.registry import make

__all__ = ["Fields", "listed", "made", "read_config", "read_tensors", "run_model", "version"]

Fields = Mapping[str, type | tuple[type, ...]]


def version() -> str:
    """Return the version of foveate that writes a folder."""
    try:
        return importlib.metadata.version("foveate")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+source"


def listed(methods: Iterable[Reducer]) -> list[dict[str, Any]]:
    """Return the names and options of methods as plain data for JSON."""
    return [
        {
            "name": one.name,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in one.config().items()},
        }
        for one in methods
    ]


def made(methods: Sequence[Mapping[str, Any]]) -> Reducer:
    """Make the methods that ``listed`` wrote: one method, or the chain of several."""
    parts = [make(one["name"], one["options"]) for one in methods]
    return parts[0] if len(parts) == 1 else Chain(*parts)


def read_config(path: Path, absent: str, format: int, fields: Fields) -> dict[str, Any]:
    """Read the JSON file that describes a saved model; ValueError if it is not what we write.

    Args:
        path: the file.
        absent: message if it does not exist.
        format: number of the format that this version reads.
        fields: fields that it must have, with their types.
    """
    config = read_json(path, absent)
    found = config.get("format") if isinstance(config, dict) else type(config).__name__
    if found != format:
        raise ValueError(f"{path} has format {found!r}; this version reads {format}")
    for key, kind in fields.items():
        if key not in config or not isinstance(config[key], kind):
            raise ValueError(f"{path} is not what foveate.save writes: see its field {key!r}")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def run_model(path: Path) -> Path:
    """Return the model inside a training run's folder, or the path if it is not such a folder.

    A run's folder may hold another model with its best weights, in a folder "best".
    """
    run = path.parent if path.name == "best" else path
    if (run / "recipe.yaml").is_file():
        for name in ("model.safetensors", "model"):
            if (path / name).exists():
                return path / name
        raise ValueError(f"{path} is a run that has not finished: it holds no model yet")
    return path
