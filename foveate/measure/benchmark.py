"""Rows, tables and a picture of a benchmark, from the times of every round.

The run of a row is the model with its dtype, "deit_s, bf16" or "deit_s, bf16, compiled", and "at"
is the batch. The part "rounds" has the time of each variant in every round (metric ms, with the
round in "draw"), from which the part "speed" is made: metrics for each variant with the 95 %
interval of the median in NAME_low and NAME_high.

    ms       time of a call
    times    as fast as the dense model, by paired rounds; of the dense model, over itself (A/A)
    share    the oracle's time over the method's
    oracle   how many times as fast as the dense model the oracle is

and alone extra (time beyond the oracle per block where the method acts, as a share of a dense
block), tokens_first, tokens_least and tokens_most (that the first and the last block feed forward),
macs and memory (over the dense model's), goal_times and goal_share (by whoever has goals); of the
dense model spread (how far its A/A interval reaches from 1), rounds and calls (a sample).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate import machine
from foveate.bench.result import Cell, Result
from foveate.measure.sheets import Sheet
from foveate.measure.style import new_figure
from foveate.measure.table import Results, formatted, frame, grid, pd, rows, select
from foveate.registry import suggest
from foveate.timing import AGAIN, DENSE, LEAST_ROUNDS, UNFUSED, Interval, paired_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["break_even", "cell_sheet", "closing", "figure", "opening", "pairs", "table_of"]

_PROGRAM = "foveate bench"
# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well.
_LOOKS = {
    "faster": ("#0072B2", "o"),
    "no difference": ("#555555", "s"),
    "slower": ("#D55E00", "v"),
}
_SPREAD = "#DDDDDD"
_WORDS = {"goal_times": ("times", "dense"), "goal_share": ("share", "oracle")}


# Rows --------------------------------------------------------------------------------------------


def table_of(result: Result) -> Results:
    """Return a benchmark as a table."""
    found: list[dict[str, Any]] = []
    for cell in result.cells:
        found += _rows(cell)
    where = {"commit": result.commit or "unknown", "machine": machine.name(result.machine)}
    about = {
        "command": result.command,
        "commit": result.commit,
        "machine": result.machine,
        "settings": result.settings,
        "left_out": result.left_out,
        "cells": [
            {
                **{"setting": cell.setting, "batch": cell.batch, "run": cell.run},
                **{"unfused": cell.unfused, "methods": cell.methods},
            }
            for cell in result.cells
        ],
    }
    return Results(frame(found, **where), about)


def load(path: Path) -> Results:
    """Read the table of a benchmark."""
    results = Results.load(path, _PROGRAM)
    if not isinstance(results.about.get("cells"), list):
        raise ValueError(f"{path} is not what {_PROGRAM} writes: it names no cells")
    return results


def _rows(cell: Cell) -> list[dict[str, Any]]:
    timings, found = cell.timings, []
    shared: dict[str, Any] = {"run": cell.setting, "at": cell.batch}

    def add(variant: str, values: dict[str, Any], part: str = "speed", **keys: Any) -> None:
        found.extend(rows(part, values, method=_method(variant), **shared, **keys))

    for name, samples in timings.samples.items():
        for number, ms in enumerate(samples):
            add(name, {"ms": float(f"{ms:.6g}")}, "rounds", draw=number)
        ratio = timings.ratio(AGAIN if name == DENSE else name, DENSE)
        add(name, _interval("ms", timings.ms(name)) | _interval("times", ratio))
        add(name, {"memory": cell.memory[name] / cell.memory[DENSE]} if cell.memory[DENSE] else {})
    spread = {"spread": cell.spread, "rounds": len(timings.samples[DENSE])}
    add(DENSE, spread | {"calls": timings.repeats})
    for name, about in cell.methods.items():
        oracle, tokens = about["oracle"], about["tokens"]
        if oracle is not None:
            extra = timings.extra_ms(name, oracle) / max(1, about["acting_blocks"])
            add(name, _interval("share", timings.ratio(name, oracle)))
            add(name, _interval("oracle", timings.ratio(oracle, DENSE)))
            add(name, {"extra": extra / (timings.ms(DENSE).median / about["depth"])})
        values = {
            "tokens_first": tokens["fed_mean_per_block"][0],
            "tokens_least": tokens["fed_last_block_min"],
            "tokens_most": tokens["fed_last_block_max"],
            "macs": about["macs"],
        }
        add(name, values)
    return found


def _method(variant: str) -> str:
    return "" if variant == DENSE else variant


def _interval(name: str, found: Interval) -> dict[str, float]:
    return {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}


# Reading it off ----------------------------------------------------------------------------------


def _cells(results: Results) -> dict[tuple[str, float], pd.DataFrame]:
    """Return what was measured of each variant, by run and batch."""
    speed = select(results.table, part="speed")
    return {key: grid(own, "method") for key, own in speed.groupby(["run", "at"], sort=False)}


def _ratio(line: pd.Series, name: str = "times") -> Interval:
    return Interval(line[name], line[f"{name}_low"], line[f"{name}_high"], 0.95)


def _methods(wide: pd.DataFrame) -> list[str]:
    """Return the names of the methods: variants that have an oracle, or known multiply-adds."""
    of_methods = wide.reindex(columns=["share", "macs"])
    return list(wide.index[of_methods.notna().any(axis=1)])


def break_even(results: Results) -> dict[tuple[str, str], tuple[float | None, tuple[float, ...]]]:
    """Return from which measured batch on a method pays, and the batches, by run and method.

    The method must be faster than the dense model, beyond the A/A spread, at that batch and all
    larger ones; None if there is no such batch.
    """
    found: dict[tuple[str, str], tuple[float | None, tuple[float, ...]]] = {}
    pays: dict[tuple[str, str], dict[float, bool]] = {}
    for (run, at), wide in _cells(results).items():
        for method in _methods(wide):
            verdict = _ratio(wide.loc[method]).beyond(wide.loc["", "spread"])
            pays.setdefault((run, method), {})[at] = verdict == "faster"
    for key, by_batch in pays.items():
        batches = tuple(sorted(by_batch))
        late = list(takewhile(by_batch.get, reversed(batches)))
        found[key] = late[-1] if late else None, batches
    return found


def pairs(several: Sequence[Results]) -> Iterator[Sheet]:
    """Return every pair of methods that ran together, cell by cell.

    Several results must be of one run; otherwise ValueError, because variants that did not take
    turns cannot be compared.
    """
    runs = [{cell["run"] for cell in results.about["cells"]} for results in several]
    common = set.intersection(*runs)
    if not common:
        raise ValueError(
            "the files hold no run in common, and what was not interleaved cannot be compared: "
            "measure all methods in one foveate bench"
        )
    first = several[0]
    for cell in first.about["cells"]:
        if cell["run"] not in common:
            continue
        run, at = cell["setting"], cell["batch"]
        wide = _cells(first)[run, at]
        spread, body = wide.loc["", "spread"], []
        for one, other in combinations(_methods(wide), 2):
            ratio = compare(first, one, other, run=run, at=at)
            body.append((one, ratio.beyond(spread), other, str(ratio)))
        table = pd.DataFrame(body, columns=["method", "", "than", "times as fast [95 %]"])
        yield Sheet(f"{run}, batch {at}: A/A spread {spread:.1%}", table, [*table])


def compare(
    results: Results, one: str, other: str, *, run: str | None = None, at: float | None = None
) -> Interval:
    """Return how many times as fast as ``other`` a variant is, by paired rounds of one cell.

    Args:
        results: of a benchmark.
        one: a variant, such as "evit(keep=0.7)"; "dense" is the model as it is.
        other: likewise.
        run: the setting, where there are several.
        at: the batch, where there are several.
    """
    rounds = select(results.table, part="rounds")
    for column, value in (("run", run), ("at", at)):
        rounds = rounds if value is None else rounds[rounds[column] == value]
    if not len(rounds):
        raise ValueError("the table does not hold every round, so nothing can be paired")
    if len(rounds[["run", "at"]].drop_duplicates()) > 1:
        raise ValueError("say with run and at which one cell is meant: the table has several")
    times = rounds.pivot_table(index="draw", columns="method", values="value")
    for name in (one, other):
        if _method(name) not in times.columns:
            raise ValueError(suggest("variant of this run", name, list(times.columns)))
    return paired_ratio(times[_method(one)].tolist(), times[_method(other)].tolist())


# In words ----------------------------------------------------------------------------------------


def opening(results: Results) -> list[str]:
    """Say what the numbers depend on."""
    facts, settings = results.about["machine"], results.about["settings"]
    lines = [
        f"torch {facts['torch']}, timm {facts['timm']}, python {facts['python']}; "
        f"{machine.name(facts)}",
        f"images: {settings.get('images', 'not recorded')}",
    ]
    return lines + ([f"weights: {settings['weights']}"] if "weights" in settings else [])


def cell_sheet(results: Results, run: str | None = None, at: float | None = None) -> Sheet:
    """Return one cell as a table, the newest unless another one is named."""
    cells = _cells(results)
    if run is None or at is None:
        run, at = list(cells)[-1]
    wide = cells[run, at]
    dense = wide.loc[""]
    known = next(c for c in results.about["cells"] if (c["setting"], c["batch"]) == (run, at))
    shown = ["", *[UNFUSED] * (UNFUSED in wide.index), *_methods(wide)]
    metrics = [*("ms", "extra", "share", "tokens_first", "macs", "memory"), *_WORDS]
    found = wide.reindex(index=shown, columns=[*wide, *(m for m in metrics if m not in wide)])
    lines = [line for _, line in found.iterrows()]
    table = pd.DataFrame(
        {
            "method": [method or DENSE for method in shown],
            "ms": formatted(found["ms"], ".2f"),
            "images/s": formatted(1e3 * at / found["ms"], ".4g"),
            "over dense [95 %]": [str(_ratio(line)) for line in lines],
            "": ["A/A", *(_ratio(line).beyond(dense["spread"]) for line in lines[1:])],
            "of oracle [95 %]": [
                str(_ratio(line, "share")) if pd.notna(line["share"]) else "" for line in lines
            ],
            "extra": formatted(found["extra"], ".1%"),
            "tokens": [_tokens(line) for line in lines],
            "MACs": formatted(found["macs"], ".2f"),
            "peak": formatted(found["memory"], ".2f"),
            "goal": [_goals(line, dense["spread"]) for line in lines],
        }
    ).fillna("")
    if not set(_WORDS) & set(wide):
        table = table.drop(columns="goal")
    if "share" not in wide:  # a network that is reduced only in part has no oracles
        table = table.drop(columns=["of oracle [95 %]", "extra"])
    title = (
        f"{run}, batch {at:g}: {dense['rounds']:.0f} rounds of {dense['calls']:.0f} calls, A/A "
        f"spread {dense['spread']:.1%}"
    )
    notes = [f"No un-fused model: {known['unfused']}"] if known["unfused"] else []
    words = ("method", "over dense [95 %]", "", "of oracle [95 %]", "goal")
    spare = ("extra", "MACs", "images/s", "tokens", "peak", "goal", "ms")
    return Sheet(title, table, [word for word in words if word in table], notes, spare)


def _tokens(line: pd.Series) -> str:
    """Say how many from the first block to the last; the extremes where images differ."""
    if pd.isna(line["tokens_first"]):
        return ""
    first, least, most = (line[f"tokens_{end}"] for end in ("first", "least", "most"))
    last = f"{least:.0f}" if least == most else f"{least:.0f}-{most:.0f}"
    return f"{first:.0f} > {last}"


def _goals(line: pd.Series, noise: float) -> str:
    """Say which goals are reached; a goal also holds within the A/A spread."""
    words = []
    for goal, (name, over) in _WORDS.items():
        bar = line.get(goal)
        if pd.isna(bar):
            continue
        near = "within A/A spread" if line[name] >= bar * (1 - noise) else "missed"
        words.append(f"{over} {bar:.2f} {'reached' if line[name] >= bar else near}")
    return ", ".join(words)


def closing(results: Results) -> list[str]:
    """Say from which batch on methods pay, and what the columns mean."""
    about = results.about
    lines = ["From which batch on it pays"]
    for (run, method), (first, measured) in break_even(results).items():
        batches = ", ".join(f"{at:g}" for at in measured)
        said = f"not within the batches measured ({batches})"
        if first is not None:
            said = f"faster than dense from batch {first:g} on (measured {batches})"
        lines.append(f"  {method} on {run}: {said}")
    ways: dict[str, dict[str, None]] = {}
    for cell in about["cells"]:
        for name, known in cell["methods"].items():
            if known["parameters"] is not None:
                ways.setdefault(known["parameters"], {})[name] = None
    lines += [f"own parameters {how}: {', '.join(names)}" for how, names in ways.items()]
    lines += [f"left out {name}: {why}" for name, why in about["left_out"].items()]
    lines += [
        "Medians; ratios are medians of those of every round, with an order-statistic interval. "
        "Faster or slower is what lies beyond the A/A spread: how far the dense model strays from "
        "itself.",
        "oracle: the same token counts by slicing, without scoring. extra: time beyond it per "
        "block where the method acts, as a share of a dense block. tokens: from the first block "
        "to the last, counted in what torch computed too. MACs: over the dense model's. peak: "
        "memory of a call, without weights and images, over the dense model's.",
    ]
    if set(_WORDS) & set(results.table["metric"]):
        lines.append("A goal holds when it is reached or lies within the A/A spread.")
    if about["machine"].get("malloc_tuned") is False:
        lines.append("malloc was not tuned: times are longer and noisier than they need be.")
    if _trial(results):
        lines.append("A quick run: a trial, not a result.")
    return lines


def _trial(results: Results) -> bool:
    rounds = select(results.table, part="speed", metric="rounds")["value"]
    return bool(results.about["settings"].get("quick")) or bool((rounds < LEAST_ROUNDS).any())


# The picture -------------------------------------------------------------------------------------


def figure(results: Results) -> Figure:
    """Draw every method's speed over the dense model: a panel for each cell, dtypes in rows."""
    wide = _cells(results)
    if not wide:
        raise ValueError("nothing was measured, so there is nothing to draw")
    runs, batches = list(dict.fromkeys(run for run, _ in wide)), sorted({at for _, at in wide})
    names = dict.fromkeys(name for one in wide.values() for name in _methods(one))
    fused = any(UNFUSED in one.index for one in wide.values())
    shown = [*[UNFUSED] * fused, *names]
    longest = max(map(len, shown), default=0)
    drawn, panels = new_figure(
        1.2 + 0.07 * longest + 2.7 * len(batches),
        1.9 + (0.6 + 0.27 * max(2, len(shown))) * len(runs),
        len(runs),
        len(batches),
    )
    ends = ["times_low", "times_high", "oracle"]
    across = pd.concat([one.reindex(index=shown, columns=ends) for one in wide.values()])
    left, right = across.min(axis=None) - 0.05, across.max(axis=None) + 0.05
    for run, line in zip(runs, panels, strict=True):
        for place, (batch, panel) in enumerate(zip(batches, line, strict=True)):
            if (run, batch) not in wide:
                panel.set_axis_off()
                continue
            _draw(panel, wide[run, batch], shown)
            handles = panel.get_legend_handles_labels()
            panel.set_title(f"{run.partition(', ')[2]}, batch {batch:g}", fontsize="medium")
            panel.set_yticks(range(len(shown)), shown if place == 0 else [""] * len(shown))
            panel.set_ylim(len(shown) - 0.4, -0.6)
            panel.set_xlim(max(left, 0), right)
    facts = results.about["machine"]
    rounds = int(select(results.table, part="speed", metric="rounds")["value"].min())
    drawn.supxlabel(
        "times as fast as the dense model, median and 95 % interval of paired rounds\n"
        f"{machine.name(facts)}; torch {facts['torch']}; {rounds} interleaved rounds"
        f"{' (a trial, not a result)' * _trial(results)}. "
        "Oracle: the same token counts, no scoring",
        fontsize="small",
    )
    drawn.legend(
        *handles,
        loc="outside upper center",
        ncols=5,
        frameon=False,
        title=f"Speed over the dense model with fused attention: {runs[0].partition(', ')[0]}",
        title_fontsize="large",
        fontsize="small",
    )
    return drawn


def _draw(panel: Any, wide: pd.DataFrame, names: Sequence[str]) -> None:
    spread = wide.loc["", "spread"]
    found = wide.reindex(index=names, columns=["times", "times_low", "times_high", "oracle"])
    places = np.arange(len(names))
    verdicts = np.array([_ratio(line).beyond(spread) for _, line in found.iterrows()])
    panel.axvline(1, color="#666666", linewidth=0.8, zorder=1)
    for verdict, (colour, marker) in _LOOKS.items():
        own, y = found[verdicts == verdict], places[verdicts == verdict]
        panel.hlines(y, own["times_low"], own["times_high"], color=colour, linewidth=2, zorder=2)
        panel.plot(own["times"], y, marker, color=colour, markersize=6, zorder=3, label=verdict)
    ticks = {"color": "black", "markersize": 11, "zorder": 2, "label": "its oracle"}
    panel.plot(found["oracle"], places, "|", **ticks)
    noise = {"color": _SPREAD, "linewidth": 0, "zorder": 0, "label": "noise (A/A)"}
    panel.axvspan(1 - spread, 1 + spread, **noise)
    panel.grid(axis="y", visible=False)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
