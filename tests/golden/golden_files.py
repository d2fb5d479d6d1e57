"""Where the reference answers are, and the models they belong to."""

from __future__ import annotations

import os
from argparse import Namespace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


def folder() -> Path:
    """$FOVEATE_GOLDEN, or the folder that lies beside a development checkout."""
    given = os.environ.get("FOVEATE_GOLDEN")
    path = Path(given) if given else Path(__file__).parents[3] / "shared" / "golden"
    if not path.is_dir():
        pytest.skip(f"no reference answers at {path}; set FOVEATE_GOLDEN")
    return path


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dict and answers of one case."""
    tensors = load_file(folder() / f"{name}.safetensors")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    answers = {k.removeprefix("out."): v for k, v in tensors.items() if k.startswith("out.")}
    return state, answers


@lru_cache
def images() -> Tensor:
    """Three images, 224 px."""
    return load_file(folder() / "images.safetensors")["images"].float()


def released(state: dict[str, Tensor], folder: Path, **beside: object) -> Path:
    """A checkpoint as authors release them: wrapped, from a parallel run, with its settings."""
    path = folder / "checkpoint.pth"
    weights = {f"module.{key}": value for key, value in state.items()}
    settings = Namespace(lr=1e-3, name="golden")
    torch.save({"model": weights, "epoch": 299, "args": settings, **beside}, path)
    return path
