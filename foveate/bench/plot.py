"""A result as one picture: every method's speed over the dense model, cell by cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.bench.result import Cell, Result
from foveate.bench.timing import UNFUSED, Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_of"]

# Okabe and Ito's colours, told apart with any kind of sight; markers say the same again.
_LOOKS = {
    "faster": ("#0072B2", "o"),
    "no difference": ("#555555", "s"),
    "slower": ("#D55E00", "v"),
}
_ORACLE = "#000000"
_SPREAD = "#DDDDDD"


def figure_of(result: Result) -> Figure:
    """A panel for each cell, a line for each method; dtypes below each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not result.cells:
        raise ValueError("nothing was measured, so there is nothing to draw")
    kinds = list(dict.fromkeys((c.model, c.dtype, c.compiled) for c in result.cells))
    batches = sorted({c.batch for c in result.cells})
    fused = any(isinstance(c.unfused, Interval) for c in result.cells)
    names = [*[UNFUSED] * fused, *result.methods]
    longest = max(map(len, names), default=0)
    figure = Figure(
        figsize=(
            1.2 + 0.07 * longest + 2.7 * len(batches),
            1.9 + (0.6 + 0.27 * max(2, len(names))) * len(kinds),
        ),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kinds), len(batches), squeeze=False, sharex=True, sharey=True)
    for kind, row in zip(kinds, panels, strict=True):
        for batch, panel in zip(batches, row, strict=True):
            cells = [
                c
                for c in result.cells
                if (c.model, c.dtype, c.compiled) == kind and c.batch == batch
            ]
            if cells:
                _draw(panel, cells[-1], names)
            else:
                panel.set_axis_off()
        row[0].set_yticks(range(len(names)), names)
        row[0].set_ylim(len(names) - 0.4, -0.6)
    left, right = panels[0][0].get_xlim()
    panels[0][0].set_xlim(max(left, 0), right)
    figure.supxlabel(_caption(result), fontsize="small")
    figure.legend(
        handles=_legend(),
        loc="outside upper center",
        ncols=5,
        frameon=False,
        title=f"Speed over the dense model with fused attention: {kinds[0][0]}",
        title_fontsize="large",
        fontsize="small",
    )
    return figure


def _draw(panel: Any, cell: Cell, names: list[str]) -> None:
    found = {row.method: row for row in cell.rows}
    panel.axvspan(1 - cell.spread, 1 + cell.spread, color=_SPREAD, linewidth=0, zorder=0)
    panel.axvline(1, color="#666666", linewidth=0.8, zorder=1)
    for place, name in enumerate(names):
        row = found.get(name)
        speed = row.over_dense if row is not None else cell.unfused if name == UNFUSED else None
        if not isinstance(speed, Interval):
            continue
        colour, marker = _LOOKS[speed.beyond(cell.spread)]
        panel.plot([speed.low, speed.high], [place, place], color=colour, linewidth=2, zorder=2)
        panel.plot(speed.median, place, marker, color=colour, markersize=6, zorder=3)
        if row is not None:
            oracle = row.oracle_over_dense.median
            panel.plot(oracle, place, "|", color=_ORACLE, markersize=11, zorder=2)
    how = "compiled" if cell.compiled else "eager"
    panel.set_title(f"batch {cell.batch}, {cell.dtype}, {how}", fontsize="medium")
    panel.grid(axis="x", color="#EEEEEE", zorder=0)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, label=verdict)
        for verdict, (colour, marker) in _LOOKS.items()
    ]
    oracle = Line2D(
        [], [], color=_ORACLE, marker="|", linestyle="none", markersize=11, label="its oracle"
    )
    return [*looks, oracle, Patch(color=_SPREAD, label="noise (A/A)")]


def _caption(result: Result) -> str:
    about, rounds = result.machine, min(cell.rounds for cell in result.cells)
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    trial = " (a trial, not a result)" if result.trial else ""
    return (
        "times as fast as the dense model, median and 95 % interval of paired rounds\n"
        f"{where}; torch {about['torch']}; {rounds} interleaved rounds{trial}. "
        "Oracle: the same token counts, no scoring"
    )
