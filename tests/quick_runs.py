"""What the tests of training and of pre-training leave out, by themselves."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from foveate import machine
from foveate.data.fashion import fashion_mnist_mini
from foveate.data.sources import memory

_unpacked = lru_cache(fashion_mnist_mini)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than the steps of a small run."""
    monkeypatch.setattr(machine, "commit", lambda: None)  # two calls of git
    monkeypatch.setattr(memory, "fashion_mnist_mini", _unpacked)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are compared to the bit, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
