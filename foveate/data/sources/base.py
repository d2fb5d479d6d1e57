"""What every source of images can do, and the parts that several kinds share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from PIL import Image

__all__ = ["NO_LABEL", "SPLITS", "VAL_NAMES", "PackedNames", "Source"]

SPLITS = ("train", "val")
VAL_NAMES = ("val", "validation", "valid", "test")  # what others call the split "val", best first
NO_LABEL = -1


class Source(Protocol):
    """Images by number, most of them with a class; cheap to send to worker processes.

    Attributes:
        spec: what the source was opened with.
        split: "train" or "val".
        classes: names in the order of the labels; None where there are no labels.
        channels: of the images, 1 or 3.
    """

    @property
    def spec(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def channels(self) -> int: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image | np.ndarray:
        """Read an image: L or RGB, or uint8 ``[H, W, C]``; ValueError with its name if damaged."""
        ...

    def label(self, index: int) -> int:
        """Give the class without decoding the image; -1 where there are no labels."""
        ...

    def name(self, index: int) -> str:
        """Name an image in messages."""
        ...


class PackedNames:
    """Strings in one block of memory.

    A list of a million strings is copied into every worker process as its reference counts change,
    and takes seconds to pickle; this one is shared and goes through at once.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())
