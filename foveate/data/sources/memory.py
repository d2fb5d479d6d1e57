"""Images that are held in memory as one array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foveate.data.fashion import CLASSES, fashion_mnist, fashion_mnist_mini
from foveate.data.sources.base import NO_LABEL, NoSplit, Source

__all__ = ["ArraySource", "open_fashion_mnist"]


@dataclass(frozen=True)
class ArraySource(Source):
    """Images ``[N, H, W, C]`` uint8 in memory; see ``Source``."""

    spec: str
    split: str
    images: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    channels: int

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else int(self.labels[index])

    def content(self, index: int) -> bytes:
        return self.images[index].tobytes()

    def sizes(self) -> np.ndarray:
        return np.full(len(self), self.images[0].nbytes)


def open_fashion_mnist(spec: str, location: str, split: str, labels: bool) -> ArraySource:
    """Open the part of Fashion-MNIST that ships, or the whole of it in a folder."""
    if split not in ("train", "test"):
        raise NoSplit(f"{spec} has the splits train and test, and no {split}")
    found = fashion_mnist(location, split) if location else fashion_mnist_mini(split)
    return ArraySource(
        spec=spec,
        split=split,
        images=found.images.permute(0, 2, 3, 1).numpy(),
        labels=found.labels.numpy() if labels else None,
        classes=CLASSES if labels else None,
        channels=1,
    )
