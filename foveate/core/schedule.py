"""Schedules: which blocks reduce, and to how many tokens, as plain integers.

"Keep 0.7" means different things in different papers: of the original or of the current count,
rounded down or up. A schedule says which, is validated once, and knows the warm-up that some
methods train with.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Schedule",
    "check_blocks",
    "check_choice",
    "check_keep",
    "check_removed",
    "nearest_share",
    "split_evenly",
    "stage_blocks",
]

# 0.7 * 10 is 7.000000000000001 or 6.999999999999999 depending on the order of operations; counts
# must not depend on that.
_SLACK = 1e-9


def check_keep(keep: float | Sequence[float], name: str = "keep") -> None:
    """Refuse keep rates outside (0, 1]."""
    single = isinstance(keep, str) or not isinstance(keep, Sequence)
    for rate in (keep,) if single else keep:  # type: ignore[union-attr]
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {rate!r}")


def check_blocks(blocks: Sequence[int], depth: int | None = None) -> tuple[int, ...]:
    """Refuse block numbers that are out of range, unsorted or repeated.

    Without a depth, when the model is not known yet, refuse only what no model could have.
    """
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int):
            raise ValueError(f"blocks must be whole numbers, got {block!r}")
        if block < 0 and depth is None:
            raise ValueError(f"blocks are counted from 0, got {block}")
        if depth is not None and not 0 <= block < depth:
            raise ValueError(f"blocks must lie in 0..{depth - 1} for {depth} blocks, got {block}")
    if list(blocks) != sorted(set(blocks)):
        raise ValueError(f"blocks must ascend without repeats, got {list(blocks)}")
    if not blocks:
        raise ValueError("blocks must name at least one block")
    return tuple(blocks)


def check_removed(r: int | float | Sequence[int | float], name: str = "r") -> None:
    """Refuse what is neither a number of patches nor a share of them."""
    for one in r if isinstance(r, Sequence) else (r,):
        whole = isinstance(one, int) and not isinstance(one, bool) and one >= 0
        if not whole and not (isinstance(one, float) and 0 < one < 1):
            raise ValueError(
                f"{name} must be a whole number of at least 0, or a share of the patches between 0 "
                f"and 1; got {one!r}"
            )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")


def nearest_share(count: int, original: int) -> float:
    """Return a share with few digits that gives the count again, rounded to the nearest."""
    for digits in range(1, 7):
        share = round(count / original, digits)
        if 0 < share <= 1 and round(original * share) == count:
            return share
    return count / original


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Split a number into parts that differ by at most one, the larger ones first."""
    each, more = divmod(total, parts)
    return tuple(each + (part < more) for part in range(parts))


def stage_blocks(depth: int, parts: int = 4) -> tuple[int, ...]:
    """Return the first block of every part except the first: 3, 6, 9 of 12; 4, 8, 12 of 16."""
    return tuple(sorted({max(1, depth * part // parts) for part in range(1, parts)} - {depth}))


@dataclass(frozen=True)
class Schedule:
    """Token counts after each reducing block.

    Attributes:
        blocks: the blocks that reduce.
        keep: one rate for all of them, or one for each.
        relative: whether rates refer to the "original" count (one rate then means keep, keep**2,
            ...) or to the "current" one.
        rounding: how to round a count that is not whole: "floor", "ceil" or "nearest".
        warmup: the rate sinks from 1 to its value on a cosine between these two points of
            training progress; None holds it constant.
        warmup_steps: number of equal steps that the warm-up takes; None changes it continuously.
            A few steps change shapes rarely, so a compiled model is rarely recompiled.
    """

    blocks: tuple[int, ...]
    keep: float | tuple[float, ...] = 1.0
    relative: str = "original"
    rounding: str = "floor"
    warmup: tuple[float, float] | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("relative", self.relative, ("original", "current"))
        check_choice("rounding", self.rounding, ("floor", "ceil", "nearest"))
        if isinstance(self.keep, Sequence) and len(self.keep) != len(self.blocks):
            raise ValueError(
                f"keep has {len(self.keep)} rates for {len(self.blocks)} blocks {self.blocks}"
            )
        if self.warmup is not None:
            points = self.warmup if isinstance(self.warmup, Sequence) else ()
            numbers = all(isinstance(p, (int, float)) for p in points)
            if len(points) != 2 or not numbers or not 0 <= points[0] <= points[1] <= 1:
                raise ValueError(
                    f"warmup must be (start, end) with 0 <= start <= end <= 1, got {self.warmup!r}"
                )
        steps = self.warmup_steps
        if steps is not None and (
            isinstance(steps, bool) or not isinstance(steps, int) or steps < 1
        ):
            raise ValueError(f"warmup_steps must be a whole number of at least 1, got {steps!r}")

    def rate(self, stage: int, progress: float = 1.0) -> float:
        """Return the keep rate of a stage at a point of training progress in [0, 1]."""
        if isinstance(self.keep, Sequence):
            return self._warmed(self.keep[stage], progress)
        keep = self._warmed(self.keep, progress)
        return float(keep ** (stage + 1)) if self.relative == "original" else keep

    def share(self, stage: int, progress: float = 1.0) -> float:
        """Return the share of the original tokens that should be left after a stage."""
        if self.relative == "original":
            return self.rate(stage, progress)
        return math.prod(self.rate(s, progress) for s in range(stage + 1))

    def _warmed(self, keep: float, progress: float) -> float:
        if self.warmup is None:
            return keep
        start, end = self.warmup
        done = 1.0 if progress >= end else max(0.0, (progress - start) / max(end - start, 1e-12))
        if self.warmup_steps is not None:
            done = math.floor(done * self.warmup_steps + _SLACK) / self.warmup_steps
        return keep + (1 - keep) * (math.cos(math.pi * done) + 1) / 2

    def count(self, stage: int, original: int, current: int, progress: float = 1.0) -> int:
        """Return the count after a stage, from 1 to the current count (0 when there are none)."""
        base = original if self.relative == "original" else current
        exact = base * self.rate(stage, progress)
        if self.rounding == "nearest":
            count = round(round(exact, 9))  # an exact half must not depend on float errors
        elif self.rounding == "floor":
            count = math.floor(exact + _SLACK)
        else:
            count = math.ceil(exact - _SLACK)
        # ``index`` gives a plain number even while a graph is made. If all numbers are dynamic,
        # counts would otherwise become formulas of rates, nested one level deeper at every stage.
        return min(current, max(1, operator.index(count)))
