"""For the pre-training tests alone."""

from __future__ import annotations

from quick_runs import on_the_cpu, quick

__all__ = ["on_the_cpu", "quick"]
