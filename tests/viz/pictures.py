"""What the tests of pictures share: a photograph made by hand, models, and image files."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from contract.table import form, reduced
from PIL import Image

from foveate.core import ReducedViT, Trace
from foveate.data import Preprocessing

__all__ = ["photo", "pixels", "traced"]


@lru_cache
def photo(width: int = 300, height: int = 240) -> Image.Image:
    """Colours that differ everywhere, none of them black or white."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([60 + 150 * x / width, 60 + 150 * y / height, 60 + (x + y) % 120], -1)
    return Image.fromarray(rgb.astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def traced(method: str, name: str = "vit", **options: object) -> tuple[ReducedViT, Trace]:
    """A small model with a method, and its trace of the photograph twice."""
    model = reduced(method, name)
    prepared = Preprocessing.of(form(name), **options)(photo())
    return model, model.trace(torch.stack([prepared.tensor, prepared.tensor.flip(-1)]))
