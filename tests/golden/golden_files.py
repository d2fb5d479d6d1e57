"""Where the reference answers are, and the models they belong to."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
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


def plain_vit(state: dict[str, Tensor], **options: object) -> VisionTransformer:
    """The small ViT that all cases share, with the given weights."""
    vit = VisionTransformer(
        img_size=224,
        patch_size=16,
        embed_dim=48,
        depth=12,
        num_heads=3,
        num_classes=10,
        **options,
    )
    vit.load_state_dict(state)
    with torch.no_grad():
        return vit.eval()
