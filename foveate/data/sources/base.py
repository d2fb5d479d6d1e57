"""The interface of all sources of images, and the parts that several kinds share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from foveate.data.images import Unreadable

__all__ = [
    "IMAGE",
    "NAMES",
    "NO_LABEL",
    "OBJECTS",
    "PIXELS",
    "SPLITS",
    "WHOLE",
    "FileSource",
    "NoSplit",
    "PackedNames",
    "Source",
    "Tell",
    "check_cut",
    "read_names",
]

WHOLE = "all"  # the one split of a set that is not cut into any
SPLITS = ("train", "val", "test", WHOLE)
# What others call the splits, the best name first.
NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
NO_LABEL = -1
IMAGE, OBJECTS, PIXELS = "image", "objects", "pixels"  # what may have labels
# Iterates over the numbers of images, and may show the progress.
Tell: TypeAlias = Callable[[Iterable[int]], Iterable[int]]


class NoSplit(ValueError):
    """A set has no such split; its message says which it has."""


def check_cut(spec: str, location: str, split: str) -> None:
    """Raise ``NoSplit`` where a location with ``{split}`` is one set, or one without is cut."""
    if ("{split}" in location) == (split == WHOLE):
        which = "is cut by its {split}" if split == WHOLE else "has no {split} in it: it is one set"
        raise NoSplit(f"{spec} {which}, so there is no split {split!r}")


def read_names(path: Path) -> tuple[str, ...] | None:
    """Read the names of classes, one a line; None where there is no such file."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    return tuple(line.strip() for line in lines)


class Source:
    """Images by number, with their targets; cheap to send to worker processes.

    Attributes:
        spec: what the source was opened with.
        split: "train", "val", "test", or "all" of a set that is not cut.
        classes: names in the order of the labels; None where there are no labels.
        channels: of the images, 1 or 3.
        finished: whether images are tensors that a transform of their own has prepared.
        labels_of: what has labels: the whole "image", "objects" (boxes, perhaps masks) or "pixels"
            (a map of classes); a set may have several.
        pixel_classes: names of the classes in a map, where it has other ones than the objects.
        category_ids: numbers of the classes in a COCO file, in the order of ``classes``.
    """

    spec: str
    split: str
    classes: tuple[str, ...] | None
    channels: int
    finished: bool = False
    labels_of: tuple[str, ...] = (IMAGE,)
    pixel_classes: tuple[str, ...] | None = None
    category_ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, index: int) -> Any:
        """Read an image: L or RGB, or uint8 ``[H, W, C]``; ``Unreadable`` if it is damaged."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """Give the class without decoding the image; -1 where there are no labels."""
        return NO_LABEL

    def targets(self, index: int) -> dict[str, Any]:
        """Return the targets of an image: a label, or boxes and masks as tv_tensors, or nothing."""
        return {} if self.classes is None else {"label": self.label(index)}

    def sample(self, index: int) -> dict[str, Any]:
        """Read an image under "image" with its targets, as transforms take them."""
        return {"image": self.image(index), **self.targets(index)}

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        return f"{self.spec} {self.split} {index}"

    def content(self, index: int) -> bytes:
        """Read the stored bytes of an image, undecoded if possible."""
        raise NotImplementedError

    def sizes(self) -> np.ndarray | None:
        """Return the number of bytes of each image; None if only reading them tells."""
        return None

    def boxes_only(self) -> Source:
        """Give the same images without the masks of their objects, which take time to decode."""
        return self

    def class_counts(self, tell: Tell = iter) -> np.ndarray:
        """Count the images of each class, or the objects, or else the pixels.

        Args:
            tell: passes the numbers of the images on, and may show the progress.
        """
        assert self.classes is not None
        labels = np.array([self.label(index) for index in tell(range(len(self)))])
        return np.bincount(labels, minlength=len(self.classes))


class FileSource(Source):
    """Images that are one file each, listed in ``files``; name and content are the file's."""

    files: PackedNames

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def content(self, index: int) -> bytes:
        try:
            return Path(self.files[index]).read_bytes()
        except OSError as error:
            raise Unreadable(f"{self.files[index]}: {error.strerror}") from error

    def sizes(self) -> np.ndarray:
        return np.array([os.path.getsize(self.files[i]) for i in range(len(self))])


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
