"""Masks of objects as polygons and as run lengths (RLE), in COCO's formats.

A mask is cut into runs of zeros and ones down its columns, zeros first. Polygons are filled and
masks are packed by ``pycocotools.mask``, because published numbers are based on its pixels. Run
lengths are read here, because the library does not notice those that end too early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["decode", "encode", "library", "mask_box", "pack", "rasterise", "run_lengths"]


def library() -> Any:
    """Return pycocotools' functions on masks; ValueError says what to install."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ValueError(
            "masks and average precision of objects need pycocotools: pip install 'foveate[dense]'"
        ) from None
    return mask


def rasterise(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Fill polygons, each ``[x0, y0, x1, y1, ...]``, into one mask ``[H, W]`` uint8."""
    coco = library()
    # Lists: the library takes an array for boxes.
    parts = coco.frPyObjects([part.tolist() for part in polygons], height, width)
    return decode(run_lengths(coco.merge(parts)["counts"]), height, width)


def encode(masks: np.ndarray) -> list[bytes]:
    """Pack masks ``[N, H, W]``, whose pixels are 0 or 1, into compressed run lengths."""
    if not len(masks):
        return []
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    return [one["counts"] for one in library().encode(columns)]


def pack(lengths: Sequence[int]) -> bytes:
    """Compress run lengths."""
    whole = {"size": [sum(lengths), 1], "counts": list(lengths)}
    found: bytes = library().frPyObjects(whole, *whole["size"])["counts"]
    return found


def run_lengths(counts: bytes) -> np.ndarray:
    """Unpack compressed run lengths.

    A length is a number of base 32 with its lowest digit first. A digit is a character from "0" on,
    48 in ASCII; bit 5 says that another one follows, bit 4 of the last one is the sign. From the
    fourth on, a length is the difference from the one two before it.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    if not len(ends) or ends[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        raise ValueError("its run lengths are damaged")
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 7:  # no run of a mask has as many digits
        raise ValueError("its run lengths are damaged")
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    values = np.add.reduceat((digits & 31) << shifts, starts)
    values -= np.where(digits[ends] & 16, np.int64(1) << (5 * (ends - starts + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0:
        raise ValueError("its run lengths are damaged")
    return values


def decode(lengths: np.ndarray, height: int, width: int) -> np.ndarray:
    """Turn run lengths into a mask ``[H, W]`` uint8; ValueError if they are of another size."""
    if lengths.sum() != height * width:
        raise ValueError(
            f"its run lengths add up to {lengths.sum()} pixels, and {width} x {height} are "
            f"{height * width}"
        )
    ones = np.arange(len(lengths), dtype=np.uint8) & 1
    return np.repeat(ones, lengths).reshape(width, height).T


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """Give left, top, right and bottom of a mask ``[H, W]``; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
