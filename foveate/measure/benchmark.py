"""What a benchmark says: rows, tables and a picture of the times of every round.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench import machine
from foveate.bench.result import Cell, Result
from foveate.bench.timing import AGAIN, DENSE, LEAST_ROUNDS, UNFUSED, Interval, paired_ratio
from foveate.measure.sheets import Sheet
from foveate.measure.style import new_figure, save
from foveate.measure.table import Results, frame, pd, rows, select
from foveate.registry import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["break_even", "cell_sheet", "closing", "figure", "opening", "pairs", "plot", "table_of"]

_PROGRAM = "foveate bench"
# Okabe and Ito's colours, told apart with any kind of sight; markers say the same again.
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
        extra = timings.extra_ms(name, oracle) / max(1, about["acting_blocks"])
        add(name, _interval("share", timings.ratio(name, oracle)))
        add(name, _interval("oracle", timings.ratio(oracle, DENSE)))
        values = {
            "extra": extra / (timings.ms(DENSE).median / about["depth"]),
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


def _wide(results: Results, run: str, at: float) -> pd.DataFrame:
    """Return one cell: a line for each variant, a column for each metric."""
    own = select(results.table, part="speed", run=run, at=at)
    return own.pivot_table(index="method", columns="metric", values="value", sort=False)


def _cells(results: Results) -> list[tuple[str, float]]:
    speed = select(results.table, part="speed")
    return list(dict.fromkeys(zip(speed["run"], speed["at"], strict=True)))


def _ratio(line: pd.Series, name: str = "times") -> Interval:
    return Interval(line[name], line[f"{name}_low"], line[f"{name}_high"], 0.95)


def _methods(wide: pd.DataFrame) -> list[str]:
    """Return the names of the methods: variants that have an oracle."""
    return [name for name in wide.index if pd.notna(wide.loc[name].get("share"))]


def break_even(results: Results) -> dict[tuple[str, str], tuple[float | None, tuple[float, ...]]]:
    """Return from which measured batch on a method pays, and the batches, by run and method.

    It must be faster than dense, beyond the A/A spread, at that batch and all larger ones; None
    where it is at none.
    """
    found: dict[tuple[str, str], tuple[float | None, tuple[float, ...]]] = {}
    for run in dict.fromkeys(run for run, _ in _cells(results)):
        batches = sorted(at for own, at in _cells(results) if own == run)
        wide = {at: _wide(results, run, at) for at in batches}
        for method in dict.fromkeys(name for one in wide.values() for name in _methods(one)):
            there = tuple(at for at in batches if method in wide[at].index)
            first = None
            for at in reversed(there):
                spread = wide[at].loc["", "spread"]
                if _ratio(wide[at].loc[method]).beyond(spread) != "faster":
                    break
                first = at
            found[run, method] = first, there
    return found


def pairs(several: Sequence[Results]) -> Iterator[Sheet]:
    """Return every pair of methods that ran together, cell by cell.

    Several results must hold one run; ValueError where they do not, because what was not
    interleaved cannot be compared.
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
        wide = _wide(first, run, at)
        body = []
        methods = _methods(wide)
        for place, one in enumerate(methods):
            for other in methods[place + 1 :]:
                ratio = compare(first, one, other, run=run, at=at)
                body.append((one, ratio.beyond(wide.loc["", "spread"]), other, str(ratio)))
        title = f"{run}, batch {at}: A/A spread {wide.loc['', 'spread']:.1%}"
        yield Sheet(title, ("<method", "<", "<than", "<times as fast [95 %]"), body)


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
    if run is None or at is None:
        run, at = _cells(results)[-1]
    wide = _wide(results, run, at)
    dense = wide.loc[""]
    lines = [name for name in (DENSE, UNFUSED) if _method(name) in wide.index]
    lines += _methods(wide)
    goals = any(name in wide for name in _WORDS)
    body = []
    for name in lines:
        line = wide.loc[_method(name)]
        verdict = "A/A" if name == DENSE else _ratio(line).beyond(dense["spread"])
        method = name not in (DENSE, UNFUSED)
        cells = [name, f"{line['ms']:.2f}", f"{1e3 * at / line['ms']:.4g}"]
        cells += [str(_ratio(line)), verdict]
        cells += [str(_ratio(line, "share")) if method else ""]
        cells += [_share(line, "extra", ".1%"), _tokens(line), _share(line, "macs", ".2f")]
        cells += [_share(line, "memory", ".2f"), *[_goals(line, dense["spread"])] * goals]
        body.append(tuple(cells))
    head = (
        *("<method", "ms", "images/s", "<over dense [95 %]", "<", "<of oracle [95 %]"),
        *("extra", "tokens", "MACs", "peak", *["<goal"] * goals),
    )
    title = (
        f"{run}, batch {at:g}: {dense['rounds']:.0f} rounds of {dense['calls']:.0f} calls, A/A "
        f"spread {dense['spread']:.1%}"
    )
    known = next(c for c in results.about["cells"] if (c["setting"], c["batch"]) == (run, at))
    notes = [f"No un-fused model: {known['unfused']}"] if known["unfused"] else []
    return Sheet(
        title, head, body, notes, ("extra", "MACs", "images/s", "tokens", "peak", "goal", "ms")
    )


def _share(line: pd.Series, name: str, form: str) -> str:
    return "" if pd.isna(line.get(name)) else format(line[name], form)


def _tokens(line: pd.Series) -> str:
    """Say how many from the first block to the last; the extremes where images differ."""
    if pd.isna(line.get("tokens_first")):
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
        "to the last. MACs: over the dense model's. peak: memory of a call, without weights and "
        "images, over the dense model's.",
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


def plot(results: Results, path: Path) -> None:
    """Write the picture: every method's speed over the dense model, with its interval."""
    save(figure(results), path)


def figure(results: Results) -> Figure:
    """Draw a panel for each cell and a line for each method; dtypes below each other."""
    cells = _cells(results)
    if not cells:
        raise ValueError("nothing was measured, so there is nothing to draw")
    runs, batches = list(dict.fromkeys(run for run, _ in cells)), sorted({at for _, at in cells})
    wide = {cell: _wide(results, *cell) for cell in cells}
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
    drawn_at = [one.reindex(shown)[["times_low", "times_high", "oracle"]] for one in wide.values()]
    left = min(float(ends.min(axis=None)) for ends in drawn_at) - 0.05
    right = max(float(ends.max(axis=None)) for ends in drawn_at) + 0.05
    for run, line in zip(runs, panels, strict=True):
        for place, (batch, panel) in enumerate(zip(batches, line, strict=True)):
            if (run, batch) not in wide:
                panel.set_axis_off()
                continue
            _draw(panel, wide[run, batch], shown)
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
        handles=_legend(),
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
    panel.axvspan(1 - spread, 1 + spread, color=_SPREAD, linewidth=0, zorder=0)
    panel.axvline(1, color="#666666", linewidth=0.8, zorder=1)
    for place, name in enumerate(names):
        if name not in wide.index:
            continue
        speed, oracle = _ratio(wide.loc[name]), wide.loc[name].get("oracle")
        colour, marker = _LOOKS[speed.beyond(spread)]
        panel.plot([speed.low, speed.high], [place, place], color=colour, linewidth=2, zorder=2)
        panel.plot(speed.median, place, marker, color=colour, markersize=6, zorder=3)
        if pd.notna(oracle):
            panel.plot(oracle, place, "|", color="black", markersize=11, zorder=2)
    panel.grid(axis="y", visible=False)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, label=verdict)
        for verdict, (colour, marker) in _LOOKS.items()
    ]
    oracle = Line2D(
        [], [], color="black", marker="|", linestyle="none", markersize=11, label="its oracle"
    )
    return [*looks, oracle, Patch(color=_SPREAD, label="noise (A/A)")]
