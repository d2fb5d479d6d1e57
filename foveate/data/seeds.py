"""Random numbers of an image that follow only from its number, in any process."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["seeded"]

# Stands in for numpy's own generator: to copy that one's state twice takes longer than most images.
_NUMPY = np.random.MT19937()
_numpy: Any = np.random  # its type stubs leave two functions out


@contextmanager
def seeded(key: tuple[int, ...]) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch from a key; put them back afterwards.

    Transforms of torchvision and timm draw from these generators, and so does the model in this
    process; without putting them back a resumed run would not find them as it left them.
    torch.manual_seed would change the generators of the devices as well.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=16).digest()
    seeds = struct.unpack("<4I", digest)
    before = random.getstate(), _numpy.get_bit_generator(), torch.get_rng_state()
    try:
        random.seed(seeds[0])
        _numpy.set_bit_generator(_NUMPY)
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(seeds[2] << 32 | seeds[3])
        yield
    finally:
        random.setstate(before[0])
        _numpy.set_bit_generator(before[1])
        torch.set_rng_state(before[2])
