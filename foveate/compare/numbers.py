"""Numbers over seeds, which never forget how many seeds they come from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MISSING", "Number", "Seed"]

Seed = int | None  # None: a model that all seeds share
MISSING = "missing"


@dataclass(frozen=True)
class Number:
    """One quantity, measured once for each seed of training.

    Attributes:
        values: by seed, of those that are there.
        missing: seeds that should be there and are not.
    """

    values: Mapping[Seed, float]
    missing: tuple[Seed, ...] = ()

    @classmethod
    def of(cls, found: Iterable[tuple[Seed, float | None]]) -> Number:
        """Collect what there is; None is missing."""
        pairs = list(found)
        return cls(
            {seed: value for seed, value in pairs if value is not None},
            tuple(seed for seed, value in pairs if value is None),
        )

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that are there; None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation of a sample, over the seeds that are there; None below two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def n(self) -> int:
        """How many seeds are there."""
        return len(self.values)

    @property
    def seeds(self) -> str:
        """How many seeds are there, and of how many where some are missing."""
        return f"{self.n} of {self.n + len(self.missing)}" if self.missing else f"{self.n}"

    def minus(self, other: Number) -> Number:
        """The difference, seed by seed; a model that all seeds share is paired with each."""
        return Number.of((seed, self._less(other, seed)) for seed in (*self.values, *self.missing))

    def _less(self, other: Number, seed: Seed) -> float | None:
        its = other.values.get(seed, other.values.get(None))
        return None if seed not in self.values or its is None else self.values[seed] - its

    def negative(self) -> Number:
        """The same below zero."""
        return Number({seed: -value for seed, value in self.values.items()}, self.missing)

    def said(self, digits: int = 2, scale: float = 1.0, *, spread: bool = True) -> str:
        """Mean, standard deviation and, in brackets, the number of seeds."""
        if self.mean is None:
            return MISSING
        text = f"{self.mean / scale:.{digits}f}"
        if spread and self.std is not None:
            text += f" ± {self.std / scale:.{digits}f}"
        return f"{text} ({self.seeds})"

    def json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "mean": self.mean,
            "std": self.std,
            "n": self.n,
            "values": {"all" if s is None else str(s): v for s, v in self.values.items()},
            "missing": ["all" if s is None else s for s in self.missing],
        }
