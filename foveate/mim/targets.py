"""Turn images into vectors of patches and back, and make the targets of a model."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gathered", "normalised", "patchify", "statistics", "unpatchify"]

_EPS = 1e-6


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Turn ``[B, C, H, W]`` into ``[B, N, rows * columns * C]``: row, column, then channel."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Turn patches back into ``[B, C, H, W]``."""
    batch, (rows, columns) = len(patches), grid
    cut = patches.reshape(batch, rows, columns, patch[0], patch[1], -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch[0], columns * patch[1])


def statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and spread of every patch over its values; the variance is the unbiased one."""
    mean = patches.mean(-1, keepdim=True)
    return mean, (patches.var(-1, keepdim=True) + _EPS).sqrt()


def normalised(patches: Tensor) -> Tensor:
    """Give each patch mean 0 and variance 1."""
    mean, spread = statistics(patches)
    return (patches - mean) / spread


def gathered(tokens: Tensor, index: Tensor) -> Tensor:
    """Take rows of ``[B, N, C]`` by ``[B, K]``."""
    batch, count, width = tokens.shape
    # Whole rows of a flat view are copied several times as fast as single numbers are gathered.
    first = torch.arange(0, batch * count, count, device=tokens.device)[:, None]
    rows = tokens.flatten(0, 1).index_select(0, (first + index).flatten())
    return rows.view(batch, index.shape[1], width)
