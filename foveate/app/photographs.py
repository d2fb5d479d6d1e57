"""Read uploaded photographs, and give examples that come with the package."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image
from torch import Tensor

from foveate.data import CLASSES, fashion_mnist_mini, open_source, read_image
from foveate.data.images import as_picture

__all__ = ["example", "read_upload", "scene"]

_LONGEST = 1600  # longer side, in pixels, of what is kept of a photograph
_SCENES = "scenes:size=64,test=500,clutter=0.3"  # what the detector that ships was trained for


def read_upload(path: Path, megabytes: float) -> Image.Image:
    """Read an uploaded image as RGB, upright and no larger than the page needs.

    Args:
        path: the file.
        megabytes: size of the largest file that is read.
    """
    size = path.stat().st_size / 2**20 if path.is_file() else 0.0
    if size > megabytes:
        raise ValueError(f"{path.name} has {size:.1f} MB; at most {megabytes:g} MB are allowed")
    try:
        image = read_image(path)
    except ValueError as error:  # name the file as the user knows it, without its folder
        raise ValueError(str(error).replace(str(path), path.name)) from error
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def example(number: int) -> tuple[str, Image.Image]:
    """Return the name and image of a garment of a class that the model "demo" knows."""
    images, labels = _garments()
    index = 7 * number % len(images)
    pixels = Image.fromarray(images[index, 0].numpy()).convert("RGB")
    return f"example: {CLASSES[int(labels[index])]}", pixels


def scene(number: int) -> tuple[str, Image.Image]:
    """Return the name and image of a scene like those that "demo_detector" was trained on."""
    scenes = open_source(_SCENES, "test")
    index = (number + 4) % len(scenes)
    return f"example: scene {index}", as_picture(scenes.image(index))


@lru_cache(1)
def _garments() -> tuple[Tensor, Tensor]:
    return fashion_mnist_mini("test")
