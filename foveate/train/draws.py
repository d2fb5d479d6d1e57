"""Random numbers of a training step, which follow from the seed and the step, so that runs resume.

A resumed run must draw the numbers that an uninterrupted one draws. So nothing may depend on how
many numbers were drawn before: every step seeds the generators anew, from the seed, the epoch and
the place in it. Numbers for an image are drawn for the batch of all processes and then divided, so
that they do not depend on which process has the image.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

__all__ = ["Draws", "seed_step"]


def seed_step(seed: int, epoch: int, step: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch for a step; each rank gets another seed."""
    value = _mixed(seed, epoch, step, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class Draws:
    """Uniform numbers for the images of a step, the same on however many processes.

    Attributes:
        rank: rank of this process.
        world: number of processes; each has the same number of images.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        step: int,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(_mixed(seed, epoch, step, -1))

    def uniform(self, batch: int, *shape: int) -> Tensor:
        """Draw numbers in [0, 1) for this process's images, ``[batch, *shape]``."""
        size = (batch * self.world, *shape)
        return self._own(torch.rand(size, generator=self._generator, device=self.device), batch)

    def seeds(self, batch: int) -> list[int]:
        """Draw a seed for each of this process's images."""
        size = (batch * self.world,)
        drawn = torch.randint(2**62, size, generator=self._generator, device=self.device)
        return self._own(drawn, batch).tolist()

    def _own(self, drawn: Tensor, batch: int) -> Tensor:
        return drawn[self.rank * batch : (self.rank + 1) * batch]


def _mixed(*parts: int) -> int:
    """Mix several numbers into one, so that neighbouring inputs give unrelated results."""
    words = [part % 2**32 for part in parts]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1
