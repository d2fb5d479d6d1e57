"""A batch of images of different sizes on one canvas, whose padding never affects a feature.

Each image lies in the top left corner of the canvas, and its own patches are those that hold a
pixel of it. Tokens outside them do not exist. Maps are cleaned (set to zero) outside them before
every convolution that could reach across the border, so that an image has the same features alone
and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from foveate.core.embedding import own_patches

__all__ = ["Canvas", "Size", "as_map", "as_tokens"]

Size = tuple[int, int]


def as_map(tokens: Tensor, grid: Size) -> Tensor:
    """View tokens ``[B, h*w, C]`` as a map ``[B, C, h, w]`` in memory format channels_last."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(values: Tensor) -> Tensor:
    """Turn a map ``[B, C, h, w]`` into tokens ``[B, h*w, C]``: a view if it is channels_last."""
    return values.permute(0, 2, 3, 1).flatten(1, 2)


@dataclass(eq=False)
class Canvas:
    """Padded images, and which part of them is real.

    Attributes:
        images: ``[B, channels, H, W]``, zero outside the images.
        patch: height and width of a patch in pixels.
        grid: patch rows and columns of the canvas.
        grids: patch rows and columns of each image.
    """

    images: Tensor
    patch: Size
    grid: Size
    grids: tuple[Size, ...]
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, images: Tensor | ImageList | Sequence[Tensor], patch: Size, multiple: int
    ) -> Canvas:
        """Lay images out on a canvas whose sides are multiples of ``multiple`` patches.

        Args:
            images: a batch ``[B, channels, H, W]`` whose images fill it, torchvision's
                ``ImageList``, or a list of images ``[channels, h, w]`` of different sizes.
            patch: height and width of a patch.
            multiple: number of patches; both sides of the canvas are a multiple of it.
        """
        if isinstance(images, ImageList):
            batch, sizes = images.tensors, [(int(h), int(w)) for h, w in images.image_sizes]
        elif isinstance(images, Tensor):
            batch, sizes = images, [(images.shape[-2], images.shape[-1])] * len(images)
        else:
            sizes = [(image.shape[-2], image.shape[-1]) for image in images]
            batch = _padded(images, sizes)
        if batch.ndim != 4:
            raise ValueError(f"images must be [B, channels, H, W], got {list(batch.shape)}")
        if not sizes or min(min(size) for size in sizes) < 1:
            raise ValueError(f"every image needs at least one pixel, got the sizes {sizes}")
        step = [side * multiple for side in patch]
        short = [-size % side for size, side in zip(batch.shape[-2:], step, strict=True)]
        if any(short):
            batch = F.pad(batch, (0, short[1], 0, short[0]))
        grid = (batch.shape[-2] // patch[0], batch.shape[-1] // patch[1])
        grids = tuple((ceil(h / patch[0]), ceil(w / patch[1])) for h, w in sizes)
        return cls(batch, patch, grid, grids)

    @property
    def whole(self) -> bool:
        """Whether every image fills the canvas."""
        return all(grid == self.grid for grid in self.grids)

    def own(self) -> Tensor | list[Tensor]:
        """Return the images as the driver takes them: each cropped to its own patches."""
        if self.whole:
            return self.images
        if len(set(self.grids)) == 1:
            return self._crop(self.images, self.grids[0])
        pairs = zip(self.images, self.grids, strict=True)
        return [self._crop(image, grid) for image, grid in pairs]

    def _crop(self, image: Tensor, grid: Size) -> Tensor:
        return image[..., : grid[0] * self.patch[0], : grid[1] * self.patch[1]]

    def resized(self, side: int) -> Tensor:
        """Return the images at ``side`` pixels per patch; each is resized on its own."""
        if self.patch == (side, side):
            return self.images

        def resize(images: Tensor, grid: Size) -> Tensor:
            size = (grid[0] * side, grid[1] * side)
            return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

        if self.whole:
            return resize(self.images, self.grid)
        batch, channels = self.images.shape[:2]
        out = self.images.new_zeros(batch, channels, self.grid[0] * side, self.grid[1] * side)
        for number, grid in enumerate(self.grids):
            image = self._crop(self.images[number : number + 1], grid)
            out[number, :, : grid[0] * side, : grid[1] * side] = resize(image, grid)[0]
        return out

    def mask(self, scale: float) -> Tensor | None:
        """Mark the real cells of a map with ``scale`` cells per patch, ``[B, 1, h, w]`` bool.

        None means that all cells are real. A cell is real if a patch of the image reaches into it.
        """
        if self.whole:
            return None
        if scale not in self._masks:
            size = self.cells(scale)
            grids = tuple((ceil(h * scale), ceil(w * scale)) for h, w in self.grids)
            real = own_patches(grids, size, self.images.device)
            self._masks[scale] = real.view(-1, 1, *size)
        return self._masks[scale]

    def cells(self, scale: float) -> Size:
        """Return rows and columns of a map with ``scale`` cells per patch."""
        return ceil(self.grid[0] * scale), ceil(self.grid[1] * scale)

    def clean(self, values: Tensor, scale: float) -> Tensor:
        """Set a map ``[B, C, h, w]`` to zero outside the images."""
        mask = self.mask(scale)
        return values if mask is None else values * mask.to(values.dtype)

    def spread(self, tokens: Tensor, grid: Size, scale: float = 1.0) -> Tensor:
        """Lay cells ``[B, h*w, C]`` of a common grid out as a map over the canvas.

        The border of each image is repeated over its padding, so that interpolation inside the
        image gives the same values as for the image alone.

        Args:
            tokens: cells of all images, row by row.
            grid: rows and columns of the cells, at most those of the canvas.
            scale: cells per patch.
        """
        if self.whole:
            return as_map(tokens, grid)
        key = ("border", grid, scale)
        if key not in self._masks:
            self._masks[key] = self._border_rows(grid, scale)
        values = tokens.flatten(0, 1).index_select(0, self._masks[key])
        return as_map(values.view(len(tokens), -1, tokens.shape[2]), self.cells(scale))

    def extend(self, values: Tensor, scale: float) -> Tensor:
        """Repeat the border of each image over the padding of a map ``[B, C, h, w]``."""
        if self.whole:
            return values
        return self.spread(as_tokens(values), (values.shape[-2], values.shape[-1]), scale)

    def enlarge(self, values: Tensor, scale: float, factor: int) -> Tensor:
        """Resize a map ``[B, C, h, w]`` bilinearly to ``factor`` times its rows and columns."""
        if factor == 1:
            return values
        values = F.interpolate(
            self.extend(values, scale),
            scale_factor=float(factor),
            mode="bilinear",
            align_corners=False,
        )
        return self.clean(values, scale * factor)

    def _border_rows(self, grid: Size, scale: float) -> Tensor:
        """Return, for every cell of the canvas, the row of the nearest cell of the same image."""
        device, size = self.images.device, self.cells(scale)
        own = [(ceil(h * scale) - 1, ceil(w * scale) - 1) for h, w in self.grids]
        last = torch.tensor(own, device=device)  # [B, 2]
        rows = torch.minimum(torch.arange(size[0], device=device), last[:, :1])  # [B, H]
        columns = torch.minimum(torch.arange(size[1], device=device), last[:, 1:])
        image = torch.arange(len(last), device=device) * (grid[0] * grid[1])
        cells = rows[:, :, None] * grid[1] + columns[:, None]
        return (cells + image[:, None, None]).flatten()


def _padded(images: Sequence[Tensor], sizes: list[Size]) -> Tensor:
    """Stack images of different sizes, zero-padded to the largest."""
    if not images:
        raise ValueError("the batch is empty: at least one image is needed")
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    padded = [
        F.pad(i, (0, width - w, 0, height - h)) for i, (h, w) in zip(images, sizes, strict=True)
    ]
    return torch.stack(padded)
