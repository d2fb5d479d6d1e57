"""Measure the memory that one call needs beyond what was allocated before, such as the weights.

On CUDA this is the peak that the allocator reports. On a CPU every allocation and release that the
allocator reports to torch's profiler is added up, so what kernels allocate inside an operator
counts too; buffers that a library keeps to itself do not. Profiling slows a call down, so it has
a pass of its own, which is never timed.
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from foveate.bench.profiling import silenced
from foveate.timing import Call

__all__ = ["peak_memory"]

_EVENT = "[memory]"


def peak_memory(call: Call, device: str) -> int:
    """Measure the bytes at the peak of one call, on top of what was allocated before it."""
    if device != "cuda":
        return _on_cpu(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(call: Call) -> int:
    cpu = [ProfilerActivity.CPU]
    with silenced(), profile(activities=cpu, profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == _EVENT]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return peak
