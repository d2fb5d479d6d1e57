"""Pseudo-random numbers that depend on whole numbers alone."""

from __future__ import annotations

from torch import Tensor

__all__ = ["hashed"]


def hashed(index: Tensor, key: int) -> Tensor:
    """Map whole numbers to pseudo-random float32 numbers in [0, 1) by integer mixing.

    No generator is involved, so the numbers are the same in every batch, on every device and
    under compilation.
    """
    mask = 0x7FFFFFFF
    h = ((index + 1) & mask) * 0x9E3779B1 + ((key + 1) * 0x85EBCA6B & mask)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = h & mask
        h = (h ^ (h >> shift)) * factor
    h = h & mask
    return ((h ^ (h >> 15)) & 0xFFFFFF).float() / 0x1000000
