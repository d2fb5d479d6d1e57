"""The results of a benchmark: the times of every round. foveate.measure summarises them."""

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
        timings: times of everything that ran, round by round.
        methods: facts about each method, by name: its oracle, tokens, multiply-adds over the dense
            model's, blocks where it acts, depth of the model, and how its own parameters came
            about.
        unfused: reason why there is no un-fused variant, or None.
        memory: bytes at the peak of a call, by variant.
        run: identifier of the run.
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
        """The setting without the batch."""
        return f"{self.model}, {self.dtype}" + ", compiled" * self.compiled

    @property
    def spread(self) -> float:
        """The noise: how far the 95 % interval of the A/A ratio reaches from 1."""
        return self.timings.ratio(AGAIN, DENSE).spread


@dataclass
class Result:
    """A benchmark: its circumstances and its cells.

    Attributes:
        command: command that was typed, or None.
        commit: commit of the code that was measured.
        machine: names and versions of the machine and its software.
        settings: everything else that the numbers depend on.
        cells: one cell for each setting.
        left_out: methods that were asked for and not measured, with the reasons.
    """

    command: str | None
    commit: str | None
    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
