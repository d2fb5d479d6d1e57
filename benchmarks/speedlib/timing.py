"""One interleaved run: every variant once a round, in random order; paired ratios of the rounds."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Interval", "Timings", "measure", "median_of", "peak_memory"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Interval:
    """A median with an order-statistic interval that covers the true median at ``level``."""

    median: float
    low: float
    high: float
    level: float

    def rounded(self, digits: int = 4) -> dict[str, float]:
        """As a dictionary for JSON."""
        return {name: round(value, digits) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_of(values: Sequence[float]) -> Interval:
    """Median with the narrowest symmetric pair of order statistics that covers 95 %.

    With fewer than six values no pair does; the answer is then the range, and ``level`` says what
    it covers. Nothing is assumed of the distribution except independent rounds.
    """
    ordered, n = sorted(values), len(values)
    rank = 0  # drop this many values at each end
    while rank + 1 < (n + 1) // 2 and _coverage(n, rank + 1) >= 0.95:
        rank += 1
    return Interval(
        statistics.median(ordered), ordered[rank], ordered[n - 1 - rank], _coverage(n, rank)
    )


def _coverage(n: int, rank: int) -> float:
    """Probability that the median lies between order statistics rank+1 and n-rank of n."""
    outside = sum(math.comb(n, i) for i in range(rank + 1))
    return max(0.0, 1 - 2 * outside / 2**n)


@dataclass
class Timings:
    """Milliseconds per call of every variant, one number a round."""

    samples: dict[str, list[float]]
    repeats: int

    def ms(self, name: str) -> Interval:
        """Median time of a variant."""
        return median_of(self.samples[name])

    def ratio(self, name: str, to: str) -> Interval:
        """How many times faster ``name`` is than ``to``: time of ``to`` over time of ``name``."""
        pairs = zip(self.samples[to], self.samples[name], strict=True)
        return median_of([reference / own for reference, own in pairs])

    def extra_ms(self, name: str, over: str) -> float:
        """Median of the per-round difference in time."""
        pairs = zip(self.samples[name], self.samples[over], strict=True)
        return statistics.median(own - other for own, other in pairs)


def measure(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int,
    sample_ms: float,
    device: str,
    seed: int = 0,
    announce: Callable[[str], None] | None = None,
) -> Timings:
    """Time all variants, interleaved.

    Args:
        calls: what to time, by name.
        rounds: rounds that count.
        warmup: rounds before them that do not.
        sample_ms: one sample repeats its call until the fastest variant takes about this long;
            the number of repeats is the same for all variants.
        device: "cpu" or "cuda"; on CUDA the device is synchronised around every sample.
        seed: of the order within rounds.
        announce: told once how long it will take.
    """
    sync = torch.cuda.synchronize if device == "cuda" else _nothing
    probe = {name: min(_sample(call, 1, sync) for _ in range(3)) for name, call in calls.items()}
    repeats = max(1, math.ceil(sample_ms / min(probe.values())))
    if announce is not None:
        seconds = sum(probe.values()) * repeats * (rounds + warmup) / 1e3
        announce(
            f"{len(calls)} variants, {warmup} + {rounds} rounds of {repeats} calls: about "
            f"{seconds:.0f} s"
        )
    order, shuffle = list(calls), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        shuffle.shuffle(order)
        for name in order:
            taken = _sample(calls[name], repeats, sync)
            if turn >= 0:
                samples[name].append(taken)
    return Timings(samples, repeats)


def _sample(call: Call, repeats: int, sync: Call) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    sync()
    return (time.perf_counter() - start) * 1e3 / repeats


def _nothing() -> None:
    return None


def peak_memory(call: Call) -> int:
    """Bytes that one call needs on the GPU beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
