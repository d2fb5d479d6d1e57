"""The table of speed goals: rows, verdicts, text and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedlib.timing import Interval, Timings
from speedlib.variants import METHODS

__all__ = ["GOALS", "Cell", "Row", "noise_of", "rows_of", "text_of", "write"]

DENSE, AGAIN = "dense", "dense again"

# Bars by batch size, or "compiled" at any batch; what has no bar is only reported.
GOALS: dict[str, dict[str, dict[str, float]]] = {
    "pruning": {"share": {"1": 0.92, "8": 0.95, "32": 0.95, "compiled": 0.95}},
    "mergence": {"share": {"1": 0.88, "8": 0.92, "32": 0.92, "compiled": 0.93}},
    "tome": {"over_dense": {"8": 1.10, "32": 1.20}, "share": {"8": 0.82, "32": 0.82}},
    "varying": {"share": {"8": 0.90, "32": 0.93}},
}
_WORDS = {"share": "oracle", "over_dense": "dense"}


@dataclass(frozen=True)
class Cell:
    """One setting that is measured in one interleaved run."""

    model: str
    dtype: str
    batch: int
    compiled: bool

    @property
    def column(self) -> str:
        """Which column of the goals applies."""
        return "compiled" if self.compiled else str(self.batch)

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.model}, {self.dtype}, batch {self.batch}, {how}"


@dataclass
class Row:
    """One method in one cell."""

    method: str
    ms: Interval
    over_dense: Interval
    oracle: str
    oracle_ms: Interval
    share: Interval
    extra_of_block: float
    tokens: dict[str, Any]
    bars: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything about it, rounded."""
        return {
            "method": self.method,
            "ms": self.ms.rounded(),
            "over_dense": self.over_dense.rounded(),
            "oracle": self.oracle,
            "oracle_ms": self.oracle_ms.rounded(),
            "share_of_oracle": self.share.rounded(),
            "extra_per_acting_block_as_share_of_a_dense_block": round(self.extra_of_block, 4),
            "tokens": self.tokens,
            "bars": self.bars,
        }


def noise_of(timings: Timings) -> tuple[Interval, float]:
    """The A/A ratio and its spread: how far its 95 % interval reaches from 1."""
    again = timings.ratio(AGAIN, DENSE)
    return again, max(abs(again.low - 1), abs(again.high - 1))


def rows_of(
    cell: Cell, timings: Timings, oracles: Mapping[str, str], facts: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """Compare every method with dense and with its oracle, and judge it by its bars."""
    _, noise = noise_of(timings)
    rows = []
    for key, oracle in oracles.items():
        about = facts[key]
        extra = timings.extra_ms(key, oracle) / max(1, about["acting_blocks"])
        row = Row(
            method=key,
            ms=timings.ms(key),
            over_dense=timings.ratio(key, DENSE),
            oracle=oracle,
            oracle_ms=timings.ms(oracle),
            share=timings.ratio(key, oracle),
            extra_of_block=extra / (timings.ms(DENSE).median / about["depth"]),
            tokens=about["tokens"],
        )
        if cell.model != "tiny":
            goals = GOALS[METHODS[key].bars]
            row.bars = [
                _judged(what, getattr(row, what).median, by_column[cell.column], noise)
                for what, by_column in goals.items()
                if cell.column in by_column
            ]
        rows.append(row)
    return rows


def _judged(what: str, value: float, bar: float, noise: float) -> dict[str, Any]:
    if value >= bar:
        verdict = "reached"
    elif value >= bar * (1 - noise):
        verdict = "within A/A spread"
    else:
        verdict = "missed"
    return {"of": _WORDS[what], "value": round(value, 4), "goal": bar, "verdict": verdict}


def text_of(cell: Cell, timings: Timings, rows: list[Row], memory: Mapping[str, int] | None) -> str:
    """The cell as a table for people."""
    again, noise = noise_of(timings)
    dense, rounds = timings.ms(DENSE), len(timings.samples[DENSE])
    lines = [
        f"{cell}: {rounds} rounds of {timings.repeats} calls",
        f"dense {dense.median:.2f} ms [{dense.low:.2f}, {dense.high:.2f}]; "
        f"A/A {again}: spread {noise:.1%}",
        f"{'method':14}{'ms':>9}  {'over dense [95 %]':23}{'oracle ms':>9}  "
        f"{'share of oracle [95 %]':24}{'extra':>6}"
        + (f"{'peak':>6}" if memory else "")
        + "  goal",
    ]
    for row in rows:
        bars = "; ".join(f"{b['of']} {b['goal']:.2f} {b['verdict']}" for b in row.bars)
        peak = f"{memory[row.method] / memory[DENSE]:6.2f}" if memory else ""
        lines.append(
            f"{row.method:14}{row.ms.median:9.2f}  {row.over_dense!s:23}"
            f"{row.oracle_ms.median:9.2f}  {row.share!s:24}{row.extra_of_block:6.1%}{peak}  "
            f"{bars or 'reported'}"
        )
    return "\n".join(lines)


def legend(memory: bool) -> str:
    """What the columns mean."""
    words = (
        "Medians; ratios are medians of the per-round ratios, with an order-statistic interval.\n"
        "extra: time beyond the oracle per block where the method acts, as a share of a dense "
        "block.\nA bar holds when it is reached or lies within the A/A spread."
    )
    return words + ("\npeak: GPU memory of a call over the dense model's." if memory else "")


def cell_json(
    cell: Cell,
    timings: Timings,
    rows: list[Row],
    memory: Mapping[str, int] | None,
    raw: bool,
) -> dict[str, Any]:
    """The cell with all medians and intervals; ``raw`` adds every sample."""
    again, noise = noise_of(timings)
    found: dict[str, Any] = {
        "model": cell.model,
        "dtype": cell.dtype,
        "batch": cell.batch,
        "compiled": cell.compiled,
        "rounds": len(timings.samples[DENSE]),
        "calls_per_sample": timings.repeats,
        "dense_ms": timings.ms(DENSE).rounded(),
        "aa_ratio": again.rounded(),
        "aa_spread": round(noise, 4),
        "variants_ms": {name: timings.ms(name).rounded() for name in timings.samples},
        "rows": [row.as_json() for row in rows],
        "peak_memory_bytes": dict(memory) if memory else None,
    }
    if raw:
        found["samples_ms"] = {
            name: [round(value, 4) for value in values] for name, values in timings.samples.items()
        }
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step, so an interrupted run leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
