"""What a benchmark measured: the times of every round. What they say is foveate.measure's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from foveate.timing import AGAIN, DENSE, Timings

__all__ = ["Cell", "Result"]


@dataclass
class Cell:
    """One setting, measured in one interleaved run.

    Attributes:
        model, dtype, batch, compiled: the setting.
        timings: of everything that ran, round by round.
        methods: what to know of each method besides its time, by name: its oracle, tokens,
            multiply-adds over the dense model's, blocks where it acts, depth of the model, and how
            its own parameters came about.
        unfused: why there is no un-fused variant, if so.
        memory: bytes at the peak of a call, by variant.
        run: tells runs apart.
    """

    model: str
    dtype: str
    batch: int
    compiled: bool
    timings: Timings
    methods: dict[str, dict[str, Any]]
    unfused: str | None
    memory: dict[str, int]
    run: str

    @property
    def setting(self) -> str:
        """Return the setting without the batch."""
        return f"{self.model}, {self.dtype}" + ", compiled" * self.compiled

    @property
    def spread(self) -> float:
        """Return the noise: how far the 95 % interval of the A/A ratio reaches from 1."""
        again = self.timings.ratio(AGAIN, DENSE)
        return max(abs(again.low - 1), abs(again.high - 1))


@dataclass
class Result:
    """A benchmark: its circumstances and its cells.

    Attributes:
        command: what was typed, if anything.
        commit: which code was measured.
        machine: versions and names.
        settings: everything else that the numbers depend on.
        cells: one for each setting.
        left_out: methods that were asked for and not measured, and why.
    """

    command: str | None
    commit: str | None
    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
