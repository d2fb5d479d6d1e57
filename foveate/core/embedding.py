"""Embed a batch: images of one size at once, images of different sizes each on its own grid.

An image in a padded batch must get the same positions as the same image alone. A model that resizes
its positions to the batch's common grid would give a smaller image the positions of a corner of
that grid. So images are embedded by size first, and then placed on the common grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.core.backbone import Backbone, Embedded

__all__ = ["embed_images", "own_patches"]

Grids = tuple[tuple[int, int], ...]


def embed_images(
    backbone: Backbone, images: Tensor | Sequence[Tensor]
) -> tuple[Embedded, Grids | None]:
    """Embed images; return each image's own grid too if the grids differ, else None.

    Args:
        backbone: the model's parts.
        images: ``[B, channels, H, W]``, or a list of ``[channels, H, W]``.
    """
    if not isinstance(images, Tensor):
        images = _stacked(images)
    if not isinstance(images, Tensor):
        return _embed_each(backbone, images)
    if images.ndim != 4:
        raise ValueError(f"images must be [B, channels, H, W], got {list(images.shape)}")
    if images.shape[0] == 0:
        raise ValueError("the batch is empty: at least one image is needed")
    return backbone.embed(images), None


def own_patches(grids: Grids, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Mark the patches of the common grid that belong to each image, ``[B, H*W]`` bool."""
    rows, columns = torch.tensor(grids, device=device).T[..., None]
    mask_rows = torch.arange(grid[0], device=device) < rows  # [B, H]
    mask_columns = torch.arange(grid[1], device=device) < columns
    return (mask_rows[:, :, None] & mask_columns[:, None]).flatten(1)


def _stacked(images: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Stack images of one size; leave a list where sizes differ."""
    if len(images) == 0:
        raise ValueError("the batch is empty: at least one image is needed")
    for number, image in enumerate(images):
        if image.ndim != 3:
            raise ValueError(
                f"each image of a list must be [channels, H, W], got {list(image.shape)} for "
                f"image {number}"
            )
    if len({image.shape[-2:] for image in images}) == 1:
        return torch.stack(tuple(images))
    return list(images)


def _embed_each(backbone: Backbone, images: list[Tensor]) -> tuple[Embedded, Grids | None]:
    """Embed images of different sizes, those of one size together."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        sizes.setdefault(tuple(image.shape[-2:]), []).append(number)
    parts: dict[int, tuple[Tensor, tuple[int, int], Tensor | None]] = {}
    for numbers in sizes.values():
        stack = torch.stack([images[n] for n in numbers])
        grid, embedded = backbone.grid_of(stack), backbone.embed(stack)
        for at, number in enumerate(numbers):
            parts[number] = (embedded.x[at], grid, embedded.table)
    each = [parts[number] for number in range(len(images))]
    grids = tuple(grid for _, grid, _ in each)
    common = (max(rows for rows, _ in grids), max(columns for _, columns in grids))
    prefix = backbone.spec.prefix
    x = torch.stack([_laid_out(x, grid, common, prefix) for x, grid, _ in each])
    tables = [
        _laid_out(table.movedim(-3, 0), grid, common, 0).movedim(0, -3)
        for _, grid, table in each
        if table is not None
    ]
    embedded = Embedded(x, common, torch.cat(tables, -3) if tables else None)
    return embedded, grids if any(grid != common for grid in grids) else None


def _laid_out(values: Tensor, grid: tuple[int, int], common: tuple[int, int], front: int) -> Tensor:
    """Place an image's rows ``[front + h*w + rest, ...]`` on the common grid, zeros elsewhere."""
    if grid == common:
        return values
    patches = grid[0] * grid[1]
    inner = values[front : front + patches].unflatten(0, grid)
    laid = values.new_zeros(*common, *values.shape[1:])
    laid[: grid[0], : grid[1]] = inner
    return torch.cat([values[:front], laid.flatten(0, 1), values[front + patches :]])
