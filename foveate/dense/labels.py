"""What data say: classes of patches, read at the middle of each, and whether there are masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from foveate.data import Source, Unreadable
from foveate.dense.canvas import Canvas, Size

__all__ = ["NO_CLASS", "classes_of_maps", "classes_of_objects", "has_masks"]

NO_CLASS = -100  # the label that torch's cross entropy ignores


def has_masks(source: Source) -> bool:
    """Return whether objects have masks, as the first readable image says; True if none is."""
    for index in range(len(source)):
        with suppress(Unreadable):  # the loader says what it cannot read
            return "masks" in source.targets(index)
    return True


def classes_of_maps(
    maps: Sequence[Tensor], ignore: int, sizes: Sequence[Size], canvas: Canvas, grid: Size
) -> Tensor:
    """Return the classes of all patches from maps of labels, ``[B, *grid]``.

    Args:
        maps: a map ``[h, w]`` for each image, in the pixels of the image as it was given.
        ignore: label of pixels that have no class.
        sizes: sizes of the images on the canvas.
        canvas: canvas that the images lie on.
        grid: rows and columns of the tokens.
    """
    found = []
    for labels, size, cells in zip(maps, sizes, canvas.grids, strict=True):
        rows, columns = _middles(cells, canvas.patch, size, tuple(labels.shape), labels.device)
        values = labels[rows[:, None], columns].long()
        found.append(values.masked_fill(values == ignore, NO_CLASS))
    return _laid_out(found, grid)


def classes_of_objects(
    targets: Sequence[Mapping[str, Tensor]], sizes: Sequence[Size], canvas: Canvas, grid: Size
) -> Tensor:
    """Return the classes of all patches from objects, ``[B, *grid]``: 0 for background.

    Where objects overlap, the smallest one counts.

    Args:
        targets: "boxes", "labels" from 1 and perhaps "masks" of each image on the canvas.
        sizes: sizes of the images on the canvas.
        canvas: canvas that the images lie on.
        grid: rows and columns of the tokens.
    """
    found = []
    for target, size, cells in zip(targets, sizes, canvas.grids, strict=True):
        boxes, labels = target["boxes"], target["labels"]
        rows, columns = _middles(cells, canvas.patch, size, size, boxes.device)
        if not len(labels):
            found.append(labels.new_zeros(cells))
            continue
        if "masks" in target:
            covered = target["masks"][:, rows[:, None], columns] > 0
        else:
            left, top, right, bottom = boxes[:, :, None, None].unbind(1)
            y, x = rows[:, None] + 0.5, columns + 0.5
            covered = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        smallest = area[:, None, None].expand_as(covered).masked_fill(~covered, torch.inf).argmin(0)
        found.append(labels[smallest] * covered.any(0))
    return _laid_out(found, grid)


def _middles(
    cells: Size, patch: Size, shown: Size, given: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Return the pixel rows and columns in the middle of the cells of an image.

    Args:
        cells: rows and columns of cells.
        patch: size of a cell, in pixels of the image on the canvas.
        shown: size of the image on the canvas.
        given: size of the image whose pixels are wanted.
        device: device of the result.
    """
    return [
        ((torch.arange(count, device=device) + 0.5) * side * own / whole).long().clamp_max(own - 1)
        for count, side, whole, own in zip(cells, patch, shown, given, strict=True)
    ]


def _laid_out(each: Iterable[Tensor], grid: Size) -> Tensor:
    several = list(each)
    out = several[0].new_full((len(several), *grid), NO_CLASS)
    for place, values in zip(out, several, strict=True):
        place[: values.shape[0], : values.shape[1]] = values
    return out
