"""Time variants in one interleaved run, each once per round in random order; pair the ratios."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "AGAIN",
    "DENSE",
    "DTYPES",
    "LEAST_ROUNDS",
    "UNFUSED",
    "Call",
    "Interval",
    "Timings",
    "measure",
    "median_of",
    "paired_ratio",
]

Call = Callable[[], Any]

# Names of the variants that every run has besides the methods and their oracles.
DENSE, AGAIN, UNFUSED = "dense", "dense again", "dense un-fused"
_REST = 0.02  # seconds; idle threads of onnxruntime and OpenMP spin for a few milliseconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_ROUNDS = 30  # a result needs as many; fewer are a trial


@dataclass(frozen=True)
class Interval:
    """A median with an order-statistic interval that covers the true median at ``level``."""

    median: float
    low: float
    high: float
    level: float

    def rounded(self, digits: int = 4) -> dict[str, float]:
        """Return the rounded numbers by name, for a JSON file."""
        return {name: round(value, digits) for name, value in vars(self).items()}

    @property
    def spread(self) -> float:
        """Return how far the interval reaches from 1: the noise, if one thing was timed twice."""
        return max(self.high - 1, 1 - self.low)

    def beyond(self, spread: float) -> str:
        """Say what a ratio means, given the noise: "faster", "slower" or "no difference".

        The whole interval must lie outside 1 +- spread; anything else was not measured.
        """
        if self.low > 1 + spread:
            return "faster"
        return "slower" if self.high < 1 - spread else "no difference"

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_of(values: Sequence[float]) -> Interval:
    """Return the median with the narrowest symmetric order statistics that cover 95 %.

    With fewer than six values no pair does; the answer is then the range, and ``level`` says what
    it covers. Nothing is assumed about the distribution except independent rounds.
    """
    ordered, n = sorted(values), len(values)
    rank = 0  # drop this many values at each end
    while rank + 1 < (n + 1) // 2 and _coverage(n, rank + 1) >= 0.95:
        rank += 1
    return Interval(
        statistics.median(ordered), ordered[rank], ordered[n - 1 - rank], _coverage(n, rank)
    )


def _coverage(n: int, rank: int) -> float:
    """Return the probability that the median lies between order statistics rank+1 and n-rank."""
    outside = sum(math.comb(n, i) for i in range(rank + 1))
    return max(0.0, 1 - 2 * outside / 2**n)


def paired_ratio(own: Sequence[float], reference: Sequence[float]) -> Interval:
    """Return how many times faster ``own`` is than ``reference``, from their times by round."""
    return median_of([other / time for other, time in zip(reference, own, strict=True)])


@dataclass
class Timings:
    """Milliseconds per call of every variant, one number per round."""

    samples: dict[str, list[float]]
    repeats: int

    def ms(self, name: str) -> Interval:
        """Return the median time of a variant."""
        return median_of(self.samples[name])

    def ratio(self, name: str, to: str) -> Interval:
        """Return how many times faster ``name`` is than ``to``."""
        return paired_ratio(self.samples[name], self.samples[to])

    def extra_ms(self, name: str, over: str) -> float:
        """Return the median of the per-round difference in time."""
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
    settle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Time all variants, interleaved.

    Args:
        calls: what to time, by name.
        rounds: rounds that count.
        warmup: rounds before them that do not count.
        sample_ms: one sample repeats its call until the fastest variant takes about this long;
            the number of repeats is the same for all variants.
        device: on CUDA the device is synchronised around every sample.
        seed: seed of the order within rounds.
        settle: before each sample, let the threads of another runtime come to rest, and wake up the
            variant's own threads by a call that does not count.
        progress: called between rounds with the number of rounds that are done, and of all rounds.
    """
    sync = torch.cuda.synchronize if device == "cuda" else _nothing
    probe = min(min(_sample(call, 1, sync) for _ in range(3)) for call in calls.values())
    repeats = max(1, math.ceil(sample_ms / probe))
    order, shuffle = list(calls), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        shuffle.shuffle(order)
        for name in order:
            if settle:
                time.sleep(_REST)
                _sample(calls[name], 1, sync)
            taken = _sample(calls[name], repeats, sync)
            if turn >= 0:
                samples[name].append(taken)
        if progress is not None:
            progress(warmup + turn + 1, warmup + rounds)
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
