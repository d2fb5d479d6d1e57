"""What a comparison found, over the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.compare.numbers import Number, Seed

__all__ = ["Curve", "Line", "Pruning", "Results", "Subject"]


@dataclass(frozen=True)
class Subject:
    """What a line is about.

    Attributes:
        model: the base model.
        method: by its name in the comparison, or with its options where it is not trained; None
            is the base model itself.
        rate: of the method.
        trained: whether the method was trained with the model.
    """

    model: str
    method: str | None = None
    rate: float | None = None
    trained: bool = True

    def __str__(self) -> str:
        if self.method is None:
            return self.model
        rate = f"-{self.rate:g}" if self.trained and self.rate is not None else ""
        return f"{self.model}, {self.method}{rate}"


@dataclass(frozen=True)
class Line:
    """Accuracy and cost of one model or method; see ``foveate.evaluate.Row`` for the quantities.

    Attributes:
        subject: what it is about.
        top1, top5: right answers in per cent.
        drop: points of top-1 below its own base model, paired by seed; None of a base model.
        macs, dense_macs, tokens: cost of an image.
        times: times as fast as its dense model, where that was measured.
        layers: tokens and usage of its last block and over all, where statistics were gathered.
    """

    subject: Subject
    top1: Number
    top5: Number
    macs: Number
    dense_macs: Number
    tokens: Number
    times: Number
    drop: Number | None = None
    layers: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Accuracy of a base model whose images miss patches; each value is a mean over mask seeds."""

    model: str
    ratios: tuple[float, ...]
    kept: tuple[int | None, ...]
    top1: tuple[Number, ...]


@dataclass(frozen=True)
class Pruning:
    """A base model pruned without training.

    Attributes:
        model: the base model.
        method: "random" or "attention".
        rate: share that each stage keeps.
        top1: each value is a mean over mask seeds.
        masks: standard deviation over the mask seeds of each.
    """

    model: str
    method: str
    rate: float
    top1: Number
    masks: Number


@dataclass
class Results:
    """Everything that is there.

    Attributes:
        lines: base models first, then methods that were trained, then those that were not.
        curves: of occlusion.
        pruning: without training.
        runs: folders of the finished trainings, by what they are about.
        raw: every single number that was measured, for the CSV.
        machines: where cells ran, with how many of them did.
        commits: which code they ran, likewise.
        mask_seeds: seeds of the masks of each model.
    """

    lines: list[Line] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    pruning: list[Pruning] = field(default_factory=list)
    runs: dict[Subject, dict[Seed, Path]] = field(default_factory=dict)
    raw: list[dict[str, Any]] = field(default_factory=list)
    machines: dict[str, int] = field(default_factory=dict)
    commits: dict[str, int] = field(default_factory=dict)
    mask_seeds: int = 0

    def line(self, subject: Subject) -> Line:
        """The line about something."""
        return next(line for line in self.lines if line.subject == subject)
