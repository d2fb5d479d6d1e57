"""Pictures of an evaluation: accuracy against cost and speed, occlusion, pruning, tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foveate.evaluate.answers import Seeded
from foveate.evaluate.occlusion import Occlusion
from foveate.evaluate.pruning import Pruned
from foveate.evaluate.rates import Row
from foveate.evaluate.report import Entry
from foveate.evaluate.style import QUIET, look, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Line",
    "lines_figure",
    "occlusion_figure",
    "pruning_figure",
    "tradeoff_figure",
]

_WIDE, _HIGH = 5.2, 3.6  # inches of the axes, about
_MOST_WORDED = 5  # lines whose points can be named without covering each other


@dataclass(frozen=True)
class Line:
    """One line of a picture; ``low`` and ``high`` bound its band, ``words`` name its points."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    words: tuple[str, ...] = ()


def lines_figure(
    lines: Sequence[Line],
    *,
    across: str,
    up: str,
    stars: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Lines with their bands, and a legend beside the picture, where it covers nothing.

    Args:
        lines: in the order of the legend.
        across: what the horizontal axis is.
        up: what the vertical axis is.
        stars: single points by name, such as dense models.
    """
    names = [*(line.label for line in lines), *(stars or {})]
    beside = 0.085 * max(map(len, names), default=0)
    figure, ((axes,),) = new_figure(_WIDE + beside, _HIGH)
    for number, line in enumerate(lines):
        style = look(number)
        if line.low:
            axes.fill_between(
                line.x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0
            )
        axes.plot(line.x, line.y, label=line.label, **style)
        rising = line.y[-1] >= line.y[0]  # words stand where the line does not go
        for x, y, words in zip(line.x, line.y, line.words, strict=False):
            axes.annotate(
                words,
                (x, y),
                xytext=(5, -10 if rising else 4),
                textcoords="offset points",
                fontsize=7,
                color=style["color"],
            )
    if all(float(x).is_integer() for line in lines for x in line.x):  # epochs, layers
        axes.xaxis.get_major_locator().set_params(integer=True)
    for number, (name, (x, y)) in enumerate((stars or {}).items()):
        axes.plot(
            [x],
            [y],
            "*",
            color="black" if number == 0 else look(number)["color"],
            markersize=12,
            label=name,
            linestyle="none",
        )
        axes.axhline(y, color=QUIET, linewidth=0.7, linestyle=":", zorder=0)
    axes.margins(0.09)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def tradeoff_figure(entries: Sequence[Entry], *, speed: bool = False) -> Figure:
    """Accuracy against multiply-adds, or against measured speed: a line for each method.

    Points of one method on one model are joined and carry their rates, if there is room.
    """
    stars: dict[str, tuple[float, float]] = {}
    lines = []
    several = len(entries) > 1
    every = [row.dense_macs or 0 for entry in entries for row in entry.rows.values()]
    unit, scale = ("GMACs", 1e9) if max(every, default=0) >= 1e9 else ("million multiply-adds", 1e6)
    for entry in entries:
        found: dict[str, list[tuple[float, float, float, str]]] = {}
        for name, row in entry.rows.items():
            timed = entry.speeds.get(name)
            cost = row.macs / scale if row.macs is not None else None
            where = cost if not speed else timed.per_second if timed is not None else None
            if where is None:
                continue
            if row.method:
                words = f"{row.rate:g}" if isinstance(row.rate, (int, float)) else ""
                point = (cost or 0.0, where, row.accuracy.top1, words)
                found.setdefault(_family(row), []).append(point)
            else:
                stars[f"{entry.label}, {name}" if several else name] = (where, row.accuracy.top1)
        for method, points in found.items():
            _, x, y, labels = zip(*sorted(points), strict=True)  # joined in order of cost
            label = f"{entry.label}, {method}" if several else method
            lines.append(Line(label, x, y, words=labels))
    if len(lines) > _MOST_WORDED:
        lines = [replace(line, words=()) for line in lines]
    batch = next((one.batch for entry in entries for one in entry.speeds.values()), 0)
    across = f"images a second at batch {batch}, measured" if speed else f"{unit} an image"
    return lines_figure(lines, across=across, up="top-1 accuracy, %", stars=stars)


def _family(row: Row) -> str:
    """A method with its options but the rate: what is one line."""
    name = re.sub(rf"\w+={re.escape(repr(row.rate))}(, )?", "", row.name, count=1)
    return name.removesuffix("()") + " (untrained)" * row.untrained


def occlusion_figure(curves: Mapping[str, Occlusion]) -> Figure:
    """Accuracy over the share of patches that the image misses; bands are of the mask seeds."""
    lines = [_line(label, curve.ratios, curve.top1) for label, curve in curves.items()]
    seeds = max(len(curve.seeds) for curve in curves.values())
    band = f"\nband: standard deviation over {seeds} mask seeds" if seeds > 1 else ""
    figure = lines_figure(
        lines,
        across=f"share of the image's patches dropped at random{band}",
        up="top-1 accuracy, %",
    )
    figure.axes[0].set_xlim(-0.02, 1.02)
    figure.axes[0].set_ylim(bottom=0)
    return figure


def pruning_figure(found: Mapping[str, Sequence[Pruned]]) -> Figure:
    """Accuracy over the share that each stage keeps, by model and by what ranks the patches."""
    lines = []
    for label, cells in found.items():
        for method, words in (("random", "random"), ("attention", "class attention")):
            own = sorted((one for one in cells if one.method == method), key=lambda one: one.rate)
            name = f"{label}, {words}" if len(found) > 1 else words
            rates = tuple(one.rate for one in own)
            lines.append(_line(name, rates, [one.top1 for one in own]))
    figure = lines_figure(
        lines,
        across="share of patches that each of three stages keeps, without training",
        up="top-1 accuracy, %",
    )
    figure.axes[0].set_ylim(bottom=0)
    return figure


def _line(label: str, x: tuple[float, ...], found: Sequence[Seeded]) -> Line:
    """Means over the seeds, and their band if there are several."""
    means = tuple(one.mean for one in found)
    spreads = [one.spread for one in found]
    if not any(spreads):
        return Line(label, x, means)
    pairs = [(mean, spread or 0.0) for mean, spread in zip(means, spreads, strict=True)]
    low, high = tuple(m - s for m, s in pairs), tuple(m + s for m, s in pairs)
    return Line(label, x, means, low, high)


def _longest(labels: Sequence[str]) -> int:
    return max(map(len, labels), default=0)
