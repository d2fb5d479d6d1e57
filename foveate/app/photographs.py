"""Photographs that were uploaded, and some that come with the page."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image

from foveate.data import CLASSES, fashion_mnist_mini, open_source, read_image
from foveate.train.callbacks import as_picture

__all__ = ["example", "read_upload", "scene"]

_LONGEST = 1600  # longer side, in pixels, of what is kept of a photograph
_SCENES = "scenes:size=64,test=500,clutter=0.3"  # what the detector that ships was trained for


def read_upload(path: Path, megabytes: float) -> Image.Image:
    """Read an uploaded image as RGB, upright and no larger than the page needs it.

    Args:
        path: the file.
        megabytes: the largest file that is read.
    """
    size = path.stat().st_size / 2**20 if path.is_file() else 0.0
    if size > megabytes:
        raise ValueError(f"{path.name} has {size:.1f} MB; at most {megabytes:g} are taken")
    try:
        image = read_image(path)
    except ValueError as error:  # names the file as the user knows it, not where it was put
        raise ValueError(str(error).replace(str(path), path.name)) from error
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def example(number: int) -> tuple[str, Image.Image]:
    """Return name and image of a garment that the model "demo" knows."""
    images, labels = _garments()
    index = 7 * number % len(images)
    pixels = Image.fromarray(images[index, 0].numpy()).convert("RGB")
    return f"example: {CLASSES[int(labels[index])]}", pixels


def scene(number: int) -> tuple[str, Image.Image]:
    """Return name and image of a scene that the detector "demo_detector" knows."""
    scenes = open_source(_SCENES, "test")
    index = (number + 4) % len(scenes)
    return f"example: scene {index}", as_picture(scenes.image(index))


_garments = lru_cache(1)(lambda: fashion_mnist_mini("test"))
