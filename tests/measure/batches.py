"""What the tests of this folder share: images in memory, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from small import noise
from torch import Tensor

from foveate.data import fashion_mnist_mini, normalise

__all__ = ["demo_batches", "made", "small_batches"]


def made(images: Tensor, labels: Tensor, batch: int) -> Callable[[], Iterator]:
    """Passes over tensors."""
    numbers = torch.arange(len(labels))

    def once() -> Iterator:
        return zip(*(part.split(batch) for part in (images, labels, numbers)), strict=True)

    return once


def demo_batches(count: int = 60, batch: int = 25) -> Callable[[], Iterator]:
    """Test images of the demo model, of all classes."""
    images, labels = fashion_mnist_mini("test")
    picks = torch.linspace(0, len(labels) - 1, count).long()
    return made(normalise(images[picks]), labels[picks], batch)


def small_batches(count: int = 7, batch: int = 3, classes: int = 10) -> Callable[[], Iterator]:
    """Noise for the small models of the contract, 48 x 48."""
    labels = torch.arange(count) * 3 % classes
    return made(noise(count, 3, 48, 48), labels, batch)
