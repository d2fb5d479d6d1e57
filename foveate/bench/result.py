"""What a benchmark found: cells, each of one interleaved run; JSON; what may be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.bench.timing import (
    AGAIN,
    DENSE,
    LEAST_ROUNDS,
    UNFUSED,
    Interval,
    Timings,
    paired_ratio,
)
from foveate.files import read_json, write_text
from foveate.registry import suggest

__all__ = [
    "LEAST_ROUNDS",
    "BreakEven",
    "Cell",
    "Comparison",
    "Result",
    "Row",
    "Variant",
    "cell_of",
    "compare",
    "compare_all",
]

FORMAT = 2  # without a number: cells had no run, samples only on request, no un-fused variant


@dataclass
class Row:
    """One method in one cell.

    Attributes:
        method: its name in this run.
        ms: time of a call.
        over_dense: how many times faster than the dense model.
        oracle: name of its oracle's variant.
        oracle_ms: the oracle's time.
        oracle_over_dense: how many times faster the oracle is than the dense model.
        share: the oracle's time over the method's.
        extra_of_block: time beyond the oracle per block where the method acts, as a share of a
            dense block.
        tokens: counts per block.
        macs: multiply-adds as a share of the dense model's; None in older files.
        parameters: how the method's own came about; None where it has none.
        bars: goals that it is held to, by whoever has some.
    """

    method: str
    ms: Interval
    over_dense: Interval
    oracle: str
    oracle_ms: Interval
    oracle_over_dense: Interval
    share: Interval
    extra_of_block: float
    tokens: dict[str, Any]
    macs: float | None = None
    parameters: str | None = None
    bars: list[dict[str, Any]] = field(default_factory=list)


# Names in the file of what is an interval, and of the rest.
_INTERVALS = {
    "ms": "ms",
    "over_dense": "over_dense",
    "oracle_ms": "oracle_ms",
    "oracle_over_dense": "oracle_over_dense",
    "share": "share_of_oracle",
}
_PLAIN = {
    "method": "method",
    "oracle": "oracle",
    "extra_of_block": "extra_per_acting_block_as_share_of_a_dense_block",
    "tokens": "tokens",
    "macs": "macs_ratio",
    "parameters": "parameters",
    "bars": "bars",
}


@dataclass(frozen=True)
class Variant:
    """What was timed in one run under one name."""

    run: str | None
    name: str
    samples: tuple[float, ...]
    spread: float


@dataclass(frozen=True)
class Comparison:
    """Two variants of one run: how many times faster the first is than the second."""

    first: str
    second: str
    ratio: Interval
    spread: float

    @property
    def verdict(self) -> str:
        """Whether the first is "faster", "slower", or there is "no difference"."""
        return self.ratio.beyond(self.spread)

    def __str__(self) -> str:
        numbers = f"{self.ratio} times as fast, A/A spread {self.spread:.1%}"
        if self.verdict == "no difference":
            return f"no difference measured between {self.first} and {self.second}: {numbers}"
        return f"{self.first} is {self.verdict} than {self.second}: {numbers}"


def compare(first: Variant, second: Variant) -> Comparison:
    """Compare two variants; ValueError where they were not interleaved in one run."""
    if first.run is None or first.run != second.run:
        raise ValueError(
            f"{first.name!r} and {second.name!r} were timed in different runs, and what was not "
            "interleaved cannot be compared: measure them together"
        )
    return Comparison(
        first.name, second.name, paired_ratio(first.samples, second.samples), first.spread
    )


@dataclass
class Cell:
    """One setting, measured in one interleaved run.

    Attributes:
        model, dtype, batch, compiled: the setting.
        rounds: rounds that counted.
        calls: calls per sample.
        variants: times of everything that ran, by name.
        again: the A/A ratio: the dense model over itself.
        rows: the methods.
        unfused: how many times faster than the fused model the un-fused one is, or why there is
            none; None in older files.
        memory: bytes at the peak of a call, by variant.
        samples: times of every round, by variant.
        run: tells runs apart.
    """

    model: str
    dtype: str
    batch: int
    compiled: bool
    rounds: int
    calls: int
    variants: dict[str, Interval]
    again: Interval
    rows: list[Row]
    unfused: Interval | str | None = None
    memory: dict[str, int] | None = None
    samples: dict[str, list[float]] | None = None
    run: str | None = None

    @property
    def spread(self) -> float:
        """The noise: how far the 95 % interval of the A/A ratio reaches from 1."""
        return max(abs(self.again.low - 1), abs(self.again.high - 1))

    @property
    def dense(self) -> Interval:
        """Time of the dense model."""
        return self.variants[DENSE]

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.model}, {self.dtype}, batch {self.batch}, {how}"

    def row(self, method: str) -> Row:
        """A method by its name; ValueError naming those there are."""
        for row in self.rows:
            if row.method == method:
                return row
        raise ValueError(suggest("method in this cell", method, [r.method for r in self.rows]))

    def peak(self, name: str) -> float | None:
        """Memory at the peak of a variant over that of the dense model."""
        if not self.memory or not self.memory.get(DENSE) or name not in self.memory:
            return None
        return self.memory[name] / self.memory[DENSE]

    def variant(self, name: str) -> Variant:
        """What was timed under a name; ValueError naming those there are."""
        if self.samples is None or self.run is None:
            raise ValueError(
                f"{self}: the file does not hold every round, so nothing can be paired"
            )
        if name not in self.samples:
            raise ValueError(suggest("variant of this run", name, self.samples))
        return Variant(self.run, name, tuple(self.samples[name]), self.spread)

    # JSON --------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """Everything about it, rounded."""
        rows = []
        for row in self.rows:
            found = {key: getattr(row, name) for name, key in _PLAIN.items()}
            found |= {key: getattr(row, name).rounded() for name, key in _INTERVALS.items()}
            rows.append(found)
        fused = self.unfused
        return {
            "run": self.run,
            "model": self.model,
            "dtype": self.dtype,
            "batch": self.batch,
            "compiled": self.compiled,
            "rounds": self.rounds,
            "calls_per_sample": self.calls,
            "dense_ms": self.dense.rounded(),
            "aa_ratio": self.again.rounded(),
            "aa_spread": round(self.spread, 4),
            "unfused_over_dense": fused.rounded() if isinstance(fused, Interval) else fused,
            "variants_ms": {name: ms.rounded() for name, ms in self.variants.items()},
            "rows": rows,
            "peak_memory_bytes": self.memory,
            "samples_ms": self.samples,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Cell:
        """Read what ``as_json``, of this or an earlier version, gave."""
        unfused = found.get("unfused_over_dense")
        variants = {name: Interval(**ms) for name, ms in found["variants_ms"].items()}
        return cls(
            model=found["model"],
            dtype=found["dtype"],
            batch=found["batch"],
            compiled=found["compiled"],
            rounds=found["rounds"],
            calls=found["calls_per_sample"],
            variants=variants,
            again=Interval(**found["aa_ratio"]),
            rows=[_row(row, variants[DENSE]) for row in found["rows"]],
            unfused=Interval(**unfused) if isinstance(unfused, dict) else unfused,
            memory=found.get("peak_memory_bytes"),
            samples=found.get("samples_ms"),
            run=found.get("run"),
        )


def _row(found: Mapping[str, Any], dense: Interval) -> Row:
    plain: dict[str, Any] = {name: found[key] for name, key in _PLAIN.items() if key in found}
    intervals: dict[str, Any] = {
        name: Interval(**found[key]) for name, key in _INTERVALS.items() if key in found
    }
    if "oracle_over_dense" not in intervals:  # an older file: the medians' ratio, no interval
        ratio = dense.median / intervals["oracle_ms"].median
        intervals["oracle_over_dense"] = Interval(ratio, ratio, ratio, 0.0)
    return Row(**plain, **intervals)


def _short(ms: float) -> float:
    """As the file has it, so that what is read back gives the same ratios."""
    return float(f"{ms:.6g}")


def cell_of(
    model: str,
    dtype: str,
    batch: int,
    compiled: bool,
    run: str,
    timings: Timings,
    facts: Mapping[str, Mapping[str, Any]],
    unfused: str | None,
    memory: dict[str, int] | None,
) -> Cell:
    """Compare every method of a run with the dense model and with its oracle.

    Args:
        model, dtype, batch, compiled, run: as the cell has them.
        timings: of all variants.
        facts: what to know of every method besides its time, by name.
        unfused: why there is no un-fused variant, if so.
        memory: bytes at the peak, by variant.
    """
    rows = []
    for name, about in facts.items():
        oracle = about["oracle"]
        extra = timings.extra_ms(name, oracle) / max(1, about["acting_blocks"])
        rows.append(
            Row(
                method=name,
                ms=timings.ms(name),
                over_dense=timings.ratio(name, DENSE),
                oracle=oracle,
                oracle_ms=timings.ms(oracle),
                oracle_over_dense=timings.ratio(oracle, DENSE),
                share=timings.ratio(name, oracle),
                extra_of_block=round(extra / (timings.ms(DENSE).median / about["depth"]), 4),
                tokens=about["tokens"],
                macs=round(about["macs"], 4),
                parameters=about["parameters"],
            )
        )
    return Cell(
        model=model,
        dtype=dtype,
        batch=batch,
        compiled=compiled,
        rounds=len(timings.samples[DENSE]),
        calls=timings.repeats,
        variants={name: timings.ms(name) for name in timings.samples},
        again=timings.ratio(AGAIN, DENSE),
        rows=rows,
        unfused=timings.ratio(UNFUSED, DENSE) if UNFUSED in timings.samples else unfused,
        memory=memory,
        samples={name: [*map(_short, ms)] for name, ms in timings.samples.items()},
        run=run,
    )


@dataclass(frozen=True)
class BreakEven:
    """From which measured batch on a method is faster than the dense model; None for none."""

    method: str
    dtype: str
    compiled: bool
    batch: int | None
    measured: tuple[int, ...]

    def __str__(self) -> str:
        how = f"{self.method}, {self.dtype}{', compiled' if self.compiled else ''}"
        measured = ", ".join(map(str, self.measured))
        if self.batch is None:
            return f"{how}: not within the batches measured ({measured})"
        return f"{how}: faster than dense from batch {self.batch} on (measured {measured})"


@dataclass
class Result:
    """A benchmark: its circumstances and its cells.

    Attributes:
        what: what was measured, in words.
        command: what was typed, if anything.
        commit: which code was measured.
        machine: versions and names.
        settings: everything else that the numbers depend on.
        cells: one for each setting.
        left_out: methods that were asked for and not measured, and why.
    """

    what: str
    command: str | None
    commit: str | None
    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def trial(self) -> bool:
        """Whether this was too quick for a result."""
        return bool(self.settings.get("quick")) or any(
            cell.rounds < LEAST_ROUNDS for cell in self.cells
        )

    @property
    def methods(self) -> list[str]:
        """Names of all methods, in the order they were given."""
        return list(dict.fromkeys(row.method for cell in self.cells for row in cell.rows))

    def table(self, width: int = 120) -> str:
        """Everything as text for people."""
        from foveate.bench.report import text_of

        return text_of(self, width)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: every method's speed over the dense model, with its interval."""
        from foveate.bench.plot import figure_of

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure_of(self).savefig(path, dpi=150)

    def break_even(self) -> list[BreakEven]:
        """From which batch on each method pays, for every dtype, eager and compiled.

        It must be faster than dense, beyond the A/A spread, at that batch and all larger ones.
        """
        found = []
        for dtype, compiled in dict.fromkeys((c.dtype, c.compiled) for c in self.cells):
            cells = [c for c in self.cells if (c.dtype, c.compiled) == (dtype, compiled)]
            cells.sort(key=lambda cell: cell.batch)
            for method in self.methods:
                there = [c for c in cells if any(r.method == method for r in c.rows)]
                first = None
                for cell in reversed(there):
                    if cell.row(method).over_dense.beyond(cell.spread) != "faster":
                        break
                    first = cell.batch
                if there:
                    batches = tuple(cell.batch for cell in there)
                    found.append(BreakEven(method, dtype, compiled, first, batches))
        return found

    def cell(self, batch: int | None = None, dtype: str | None = None) -> Cell:
        """The one cell of a batch and dtype, which may be left out where there is one anyway."""
        found = [
            cell
            for cell in self.cells
            if batch in (None, cell.batch) and dtype in (None, cell.dtype)
        ]
        if len(found) == 1:
            return found[0]
        there = "; ".join(map(str, self.cells))
        raise ValueError(f"say with batch and dtype which one cell is meant of: {there}")

    def compare(
        self, first: str, second: str, *, batch: int | None = None, dtype: str | None = None
    ) -> Comparison:
        """Compare two variants of one run by their names, such as "dense" or "evit(keep=0.7)"."""
        cell = self.cell(batch, dtype)
        return compare(cell.variant(first), cell.variant(second))

    # JSON --------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON in one step, so that an interrupted run leaves the last complete file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _dumped(self.as_json()) + "\n")

    def as_json(self) -> dict[str, Any]:
        """Plain data of everything."""
        return {
            "format": FORMAT,
            "what": self.what,
            "command": self.command,
            "commit": self.commit,
            "machine": self.machine,
            "settings": self.settings,
            "left_out": self.left_out,
            "cells": [cell.as_json() for cell in self.cells],
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read what ``save``, of this or an earlier version, wrote."""
        absent = f"{path} does not exist; expected what foveate bench wrote"
        found = read_json(Path(path), absent)
        try:
            if found.get("format", 1) > FORMAT:
                raise ValueError(f"{path} is of a newer version of foveate")
            return cls(
                found["what"],
                found["command"],
                found["commit"],
                found["machine"],
                found["settings"],
                [Cell.from_json(cell) for cell in found["cells"]],
                found.get("left_out", {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what foveate bench writes: see {error}") from error


def compare_all(results: Sequence[Result]) -> Iterator[tuple[Cell, list[Comparison]]]:
    """Every pair of methods that ran together, cell by cell.

    Several results must come from one run; ValueError where they do not.
    """
    runs = [{cell.run for cell in result.cells} - {None} for result in results]
    if not set.intersection(*runs):
        raise ValueError(
            "the files hold no run in common, and what was not interleaved cannot be compared: "
            "measure all methods in one foveate bench"
            if len(results) > 1
            else "the file does not hold every round, so its methods cannot be paired"
        )
    for cell in results[0].cells:
        if not all(cell.run in run for run in runs):
            continue
        variants = [cell.variant(row.method) for row in cell.rows]
        pairs = [
            compare(first, second)
            for place, first in enumerate(variants)
            for second in variants[place + 1 :]
        ]
        yield cell, pairs


def _dumped(content: Any, indent: int = 0) -> str:
    """JSON with one line for each list of plain values: rounds are many."""
    pad = " " * (indent + 1)
    if isinstance(content, dict) and content:
        lines = [f"{pad}{json.dumps(k)}: {_dumped(v, indent + 1)}" for k, v in content.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    if isinstance(content, list) and any(isinstance(v, (dict, list)) for v in content):
        lines = [pad + _dumped(v, indent + 1) for v in content]
        return "[\n" + ",\n".join(lines) + "\n" + " " * indent + "]"
    return json.dumps(content)
