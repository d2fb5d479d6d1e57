"""Masks of three kinds, drawn on the device, which hide patches from a model.

1 or True means hidden, here and everywhere in pre-training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.core.schedule import check_choice
from foveate.train.draws import Draws
from foveate.train.masking import kept_patches

__all__ = ["KINDS", "Mask", "Hiding"]

KINDS = ("random", "unit", "block")
# BEiT's blocks on a grid of 196 patches; other grids have the same shares of theirs.
_SMALLEST, _LARGEST, _SHAPE = 16 / 196, 60 / 196, 0.3
_TRIES = 200  # of placing a block; small grids run out of places


@dataclass(frozen=True, eq=False)
class Mask:
    """Hidden patches of a batch.

    Attributes:
        hidden: ``[B, N]`` bool.
        visible: positions of the patches that are seen, ``[B, V]``; None where images differ in
            their number.
        masked: positions of the hidden ones, ``[B, M]``; None likewise.
    """

    hidden: Tensor
    visible: Tensor | None = None
    masked: Tensor | None = None

    @classmethod
    def of(cls, hidden: Tensor) -> Mask:
        """Make a mask from ``[B, N]`` or ``[B, rows, columns]`` bool."""
        if hidden.dtype != torch.bool or hidden.ndim not in (2, 3):
            raise ValueError(
                f"a mask is bool [B, N] or [B, rows, columns], got {hidden.dtype} "
                f"{list(hidden.shape)}"
            )
        hidden = hidden.flatten(1)
        counts = set(hidden.sum(1).tolist())
        return cls.even(hidden, counts.pop()) if len(counts) == 1 else cls(hidden)

    @classmethod
    def even(cls, hidden: Tensor, count: int) -> Mask:
        """Make a mask that hides ``count`` patches in every image, which is not checked."""
        order = torch.argsort(hidden.to(torch.uint8), dim=1, stable=True)
        seen = hidden.shape[1] - count
        return cls(hidden, order[:, :seen], order[:, seen:])

    def repeated(self, times: int) -> Mask:
        """Return the mask of a batch that repeats the images ``times`` times, one after another."""
        parts = (self.visible, self.masked)
        again = (part if part is None else part.repeat(times, 1) for part in parts)
        return Mask(self.hidden.repeat(times, 1), *again)

    @classmethod
    def from_noise(cls, noise: Tensor, count: int) -> Mask:
        """Hide the ``count`` patches with the most noise in each image of ``[B, N]``."""
        order = noise.argsort(1)
        seen = noise.shape[1] - count
        hidden = torch.ones_like(noise, dtype=torch.bool)
        hidden.scatter_(1, order[:, :seen], False)
        return cls(hidden, order[:, :seen], order[:, seen:])


@dataclass(kw_only=True)
class Hiding:
    """How patches are hidden.

    Attributes:
        kind: "random" hides single patches, "unit" random squares of several patches, and "block"
            rectangles as BEiT does, until the ratio is reached. None uses the method's own kind.
        ratio: share of the patches to hide; None uses the method's own.
        unit: side of a "unit" in pixels.
        blocks: for "block", share of the hidden patches that lie in rectangles; the others are
            hidden one by one. None uses the method's own.
    """

    kind: str | None = None
    ratio: float | None = None
    unit: int = 32
    blocks: float | None = None

    def __post_init__(self) -> None:
        check_choice("mask.kind", self.kind, (None, *KINDS))
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(
                f"mask.ratio must lie between 0 and 1, got {self.ratio}: something must be hidden "
                "and something seen"
            )
        if self.unit < 1:
            raise ValueError(f"mask.unit must be at least 1 pixel, got {self.unit}")
        if self.blocks is not None and not 0 < self.blocks <= 1:
            raise ValueError(f"mask.blocks must lie in (0, 1], got {self.blocks}")

    def filled(self, own: Hiding) -> Hiding:
        """Return the settings, with a method's own values for those not given."""
        kind = self.kind or own.kind
        if self.blocks is not None and kind != "block":
            raise ValueError(f"mask.blocks is for mask.kind=block, and the kind is {kind}")
        return Hiding(
            kind=kind,
            ratio=own.ratio if self.ratio is None else self.ratio,
            unit=self.unit,
            # What a method says of its blocks is no word on those that somebody else wants.
            blocks=own.blocks if self.blocks is None and kind == own.kind else self.blocks,
        )

    def count(self, grid: tuple[int, int], patch: tuple[int, int]) -> int:
        """Count the hidden patches of an image; ValueError where the grid does not fit."""
        assert self.kind is not None and self.ratio is not None
        patches = grid[0] * grid[1]
        if self.kind == "random":
            hidden = patches - kept_patches(patches, self.ratio)
        elif self.kind == "block":
            hidden = round(self.ratio * patches)
        else:
            rows, columns = self._units(grid, patch)
            # A hair is forgiven to products such as 0.6 x 5.
            hidden = math.ceil(self.ratio * rows * columns - 1e-6) * patches // (rows * columns)
        if not 0 < hidden < patches:
            raise ValueError(
                f"mask.ratio={self.ratio:g} hides {hidden} of {patches} patches: something must be "
                "hidden and something seen"
            )
        return hidden

    def draw(self, batch: int, grid: tuple[int, int], patch: tuple[int, int], draws: Draws) -> Mask:
        """Draw masks for the images of a step."""
        rows, columns = grid
        count = self.count(grid, patch)
        if self.kind == "random":
            return Mask.from_noise(draws.uniform(batch, rows * columns), count)
        if self.kind == "block":
            return _blocks(batch, grid, count, round((self.blocks or 1.0) * count), draws)
        down, across = self._units(grid, patch)
        each = (rows // down) * (columns // across)
        units = Mask.from_noise(draws.uniform(batch, down * across), count // each).hidden
        hidden = units.view(batch, down, across)
        hidden = hidden.repeat_interleave(rows // down, 1).repeat_interleave(columns // across, 2)
        return Mask.even(hidden.flatten(1), count)

    def _units(self, grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
        size = (grid[0] * patch[0], grid[1] * patch[1])
        for side, step in zip(size, patch, strict=True):
            if self.unit % step or side % self.unit:
                raise ValueError(
                    f"mask.unit={self.unit} pixels must divide images of {size[0]} x {size[1]} and "
                    f"be a multiple of the patch of {patch[0]} x {patch[1]}"
                )
        return size[0] // self.unit, size[1] // self.unit


def _blocks(batch: int, grid: tuple[int, int], count: int, inside: int, draws: Draws) -> Mask:
    """Hide rectangles until ``inside`` patches are hidden, then patches; on the CPU, by image."""
    seeds = (draws.uniform(batch, 2).double() * 2**24).long().tolist()
    hidden = [_block_mask(np.random.default_rng(seed), grid, count, inside) for seed in seeds]
    flat = torch.from_numpy(np.stack(hidden)).flatten(1).to(draws.device)
    return Mask.even(flat, count)


def _block_mask(
    random: np.random.Generator, grid: tuple[int, int], count: int, inside: int
) -> np.ndarray:
    rows, columns = grid
    hidden = np.zeros(grid, dtype=bool)
    smallest, largest = _SMALLEST * rows * columns, _LARGEST * rows * columns
    tries = 0
    while (left := inside - int(hidden.sum())) and tries < _TRIES:
        tries += 1
        area = random.uniform(smallest, max(smallest, min(largest, left)))
        shape = math.exp(random.uniform(math.log(_SHAPE), -math.log(_SHAPE)))
        height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, side = random.integers(rows - height + 1), random.integers(columns - width + 1)
        place = hidden[top : top + height, side : side + width]
        new = place.size - int(place.sum())
        if 0 < new <= min(left, largest):
            place[...] = True
            tries = 0
    # What no block fits any more goes patch by patch, so that all images hide as many.
    rest = random.permutation(np.flatnonzero(~hidden))[: count - int(hidden.sum())]
    hidden.flat[rest] = True
    return hidden
