"""Show where a method's time goes, operator by operator, next to its oracle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["compare", "silenced", "table"]


@contextmanager
def silenced() -> Iterator[None]:
    """Keep what torch's profiler writes to the error output off the terminal."""
    said, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(said, 2)
        os.close(said)
        os.close(nowhere)


def _profiled(call: Callable[[], Any], device: str, calls: int) -> Any:
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(3):
        call()
    with silenced(), profile(activities=activities) as found:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    return found.key_averages()


def table(call: Callable[[], Any], device: str, calls: int = 10, rows: int = 25) -> str:
    """Return torch.profiler's own table of the costliest operators."""
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(_profiled(call, device, calls).table(sort_by=by, row_limit=rows))


def compare(
    call: Callable[[], Any], oracle: Callable[[], Any], device: str, calls: int = 10, rows: int = 25
) -> str:
    """List the operators on which a method spends most time beyond its oracle."""
    ours, theirs = (_totals(_profiled(c, device, calls), device, calls) for c in (call, oracle))
    lines = [f"{'operator':44}{'calls':>7}{'oracle':>8}{'us':>11}{'oracle us':>11}{'more us':>10}"]
    names = sorted(
        {*ours, *theirs}, key=lambda n: ours.get(n, (0, 0))[1] - theirs.get(n, (0, 0))[1]
    )
    for name in reversed(names[-rows:]):
        (count, time), (count0, time0) = ours.get(name, (0, 0.0)), theirs.get(name, (0, 0.0))
        lines.append(
            f"{name[:43]:44}{count:7.1f}{count0:8.1f}{time:11.1f}{time0:11.1f}{time - time0:+10.1f}"
        )
    total, total0 = (sum(t for _, t in found.values()) for found in (ours, theirs))
    lines.append(f"{'all':59}{total:11.1f}{total0:11.1f}{total - total0:+10.1f}")
    return "\n".join(lines)


def _totals(events: Any, device: str, calls: int) -> dict[str, tuple[float, float]]:
    found = {}
    for event in events:
        time = event.self_cpu_time_total
        if device == "cuda":
            time = getattr(event, "self_device_time_total", 0) or 0
        found[event.key] = (event.count / calls, time / calls)
    return found
