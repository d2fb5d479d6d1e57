"""Settings for all tests. This folder is on the path, so tests can share ``small.py``."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers share the cores, and small tensors gain nothing from threads.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Undo what a command set in this process: results to the bit depend on the threads."""
    torch.set_num_threads(1)


# torch writes every step of a capture down where anybody listens, and pytest listens to all.
logging.getLogger("torch.__trace").disabled = True

# The machine that checks may be slow, and a failure must come back: no deadline, no chance.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
