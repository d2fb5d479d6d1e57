"""What quick runs leave out."""

from __future__ import annotations

from quick_runs import on_the_cpu, quick

__all__ = ["on_the_cpu", "quick"]
