"""Map the pixels of an image to the patches of a grid."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from foveate.core import Trace
from foveate.data import read_image, to_rgb

__all__ = ["Box", "Panel", "as_image", "check_index", "laid", "panel", "seen", "shrunk"]

Box = tuple[float, float, float, float]

_SMALLEST = 224  # longer side of a panel; smaller images are enlarged by a whole factor
_CELL = 4  # smallest side of a grid cell, in pixels
_UNSEEN = 0.75  # how strongly to lighten the part of the image that was cropped away
_MOST_PIXELS = 40_000_000  # of all panels together; larger images are shrunk


def as_image(image: Any) -> Image.Image:
    """Make an RGB image from a path, a PIL image or uint8 pixels ``[C, H, W]``, C = 1 or 3."""
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        if image.shape[0] in (1, 3) and image.size:
            pixels = np.repeat(image, 3 // image.shape[0], axis=0)
            return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    raise ValueError(
        "image must be a path, a PIL image or uint8 pixels of [1 or 3, H, W], got "
        f"{type(image).__name__} {getattr(image, 'dtype', '')} "
        f"{list(getattr(image, 'shape', ()))}"
    )


@dataclass(frozen=True)
class Panel:
    """An image as it is drawn, and the patch that each of its pixels belongs to.

    Attributes:
        pixels: ``[h, w, 3]`` float RGB.
        cell: patch of each pixel, ``[h, w]``; -1 for pixels that the model did not see.
        thickness: thickness of outlines in pixels.
    """

    pixels: np.ndarray
    cell: np.ndarray
    thickness: int

    def of(self, values: np.ndarray, outside: Any = 0) -> np.ndarray:
        """Spread one value per patch, ``[H*W, ...]``, over the pixels."""
        padded = np.concatenate([values, np.full_like(values[:1], outside)])
        return padded[self.cell]

    def where(self, patches: np.ndarray, pixels: np.ndarray) -> Panel:
        """Return the panel with other pixels in the given patches, ``[H*W]`` bool."""
        here = self.of(patches, False)[..., None]
        return Panel(np.where(here, pixels, self.pixels), self.cell, self.thickness)

    def painted(self, mask: np.ndarray, colour: tuple[int, int, int]) -> Panel:
        """Return the panel with the given pixels, ``[h, w]`` bool, in one colour."""
        pixels = np.where(mask[..., None], np.array(colour, dtype=np.float32), self.pixels)
        return Panel(pixels, self.cell, self.thickness)

    def borders(self, values: np.ndarray) -> np.ndarray:
        """Find pixels next to patches of another value, ``[h, w]`` bool, not at the image's rim."""
        labels = self.of(values, -2)
        near = np.zeros(labels.shape, dtype=bool)
        down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
        near[1:] |= down
        near[:-1] |= down
        near[:, 1:] |= right
        near[:, :-1] |= right
        if self.thickness == 1:
            return near
        wide = Image.fromarray(near).convert("L").filter(ImageFilter.MaxFilter(self._kernel))
        return np.asarray(wide) > 0

    @property
    def _kernel(self) -> int:
        return 2 * self.thickness - 1

    def image(self) -> Image.Image:
        """Return the panel as a picture."""
        return Image.fromarray(np.round(self.pixels).clip(0, 255).astype(np.uint8))


def shrunk(image: Image.Image, longest: int, box: Box | None) -> tuple[Image.Image, Box | None]:
    """Shrink an image to at most ``longest`` pixels on its longer side, and the box with it."""
    picture = image.copy()
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if box is not None:
        across, down = picture.width / image.width, picture.height / image.height
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return picture, box


def panel(
    image: Image.Image, grid: tuple[int, int], box: Box | None = None, panels: int = 1
) -> Panel:
    """Lay a grid of patches over an RGB image at its own resolution.

    Args:
        image: the image.
        grid: patch rows and columns.
        box: left, top, right and bottom of the part that patches cover; None is the whole image.
        panels: number of panels in the picture.
    """
    full = (0.0, 0.0, float(image.width), float(image.height))
    box = full if box is None else box
    drawn = image.resize(_size(image, grid, panels), _filter(image, grid, panels))
    across = _cells(drawn.width, image.width, box[0], box[2], grid[1])
    downwards = _cells(drawn.height, image.height, box[1], box[3], grid[0])
    cell = downwards[:, None] * grid[1] + across
    cell = np.where((downwards[:, None] < 0) | (across < 0), -1, cell)
    side = min(drawn.width / grid[1], drawn.height / grid[0])
    thickness = 1 + int(side >= 28) + int(side >= 64)
    return Panel(np.asarray(drawn, dtype=np.float32), cell, thickness)


def laid(trace: Trace, index: int, image: Image.Image, box: Box | None, panels: int) -> Panel:
    """Lay a trace's grid over one of its images; padding lies outside the picture.

    Arguments are those of ``panel``, but ``box`` is the part that the image's own patches cover. It
    reaches beyond the image if its last patches do.
    """
    check_index(trace, index)
    full = (0.0, 0.0, float(image.width), float(image.height))
    left, top, right, bottom = full if box is None else box
    (rows, columns), (own_rows, own_columns) = trace.grid, trace.grids[index]
    right = left + (right - left) * columns / own_columns
    bottom = top + (bottom - top) * rows / own_rows
    return seen(panel(image, trace.grid, (left, top, right, bottom), panels))


def check_index(trace: Trace, index: int) -> int:
    """Return the image number; ValueError if the trace has no such image."""
    batch = trace.blocks[0].mlp.batch
    if not 0 <= index < batch:
        raise ValueError(f"index must lie in 0..{batch - 1}, the images of the trace; got {index}")
    return index


def seen(base: Panel) -> Panel:
    """Return the panel with the part that the model did not see faded to white."""
    faded = (1 - _UNSEEN) * base.pixels + _UNSEEN * 255
    pixels = np.where((base.cell < 0)[..., None], faded, base.pixels)
    return Panel(pixels, base.cell, base.thickness)


def _size(image: Image.Image, grid: tuple[int, int], panels: int) -> tuple[int, int]:
    """Return the width and height at which an image is drawn."""
    width, height = image.size
    factor = max(1, -(-_SMALLEST // max(width, height)))
    width, height = width * factor, height * factor
    # An image of a few rows of pixels would have no room for its cells.
    width = max(width, width * -(-_CELL * grid[1] // width))
    height = max(height, height * -(-_CELL * grid[0] // height))
    shrink = (_MOST_PIXELS / (panels * width * height)) ** 0.5
    if shrink < 1:
        width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    return width, height


def _filter(image: Image.Image, grid: tuple[int, int], panels: int) -> Image.Resampling:
    """Choose whole pixels for images that grow and a smooth filter for those that shrink."""
    grows = _size(image, grid, panels)[0] >= image.width
    return Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS


def _cells(drawn: int, real: int, low: float, high: float, count: int) -> np.ndarray:
    """Find the grid row or column of each drawn pixel's middle; -1 means none."""
    middle = (np.arange(drawn) + 0.5) * (real / drawn)
    cell = np.floor((middle - low) / max(high - low, 1e-9) * count).astype(int)
    return np.where((cell >= 0) & (cell < count), cell, -1)
