"""What every source of images can do, and the parts that several kinds share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from PIL import Image

__all__ = ["NAMES", "NO_LABEL", "SPLITS", "WHOLE", "NoSplit", "PackedNames", "Source"]

WHOLE = "all"  # the one split of a set that is not cut into any
SPLITS = ("train", "val", "test", WHOLE)
# What others call the splits, the best name first.
NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
NO_LABEL = -1


class NoSplit(ValueError):
    """A set has no such split; its message says which it has."""


class Source(Protocol):
    """Images by number, most of them with a class; cheap to send to worker processes.

    Attributes:
        spec: what the source was opened with.
        split: "train", "val", "test", or "all" of a set that is not cut.
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

    def content(self, index: int) -> bytes:
        """Read what is stored of an image, undecoded where that is possible."""
        ...

    def sizes(self) -> np.ndarray | None:
        """Give the bytes of each image's content; None where only reading them tells."""
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
