"""Pictures of pre-training runs: heterogeneity by layer, and affinity maps of one image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.measure.kept import evenly
from foveate.measure.look import Network, Point, Report, RunLook, words
from foveate.measure.style import QUIET, new_figure
from foveate.viz.colours import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["affinity_figure", "layers_figure"]

_WIDE, _HIGH = 3.9, 3.3  # inches of a panel
_ACROSS = 3  # panels in a row
_SIDE = 1.9  # inches of a map
_ROWS = 6  # of maps
_BRIGHTEST = 99  # per cent of a map's values are below its brightest colour


def layers_figure(report: Report) -> Figure:
    """Draw heterogeneity by layer: a panel for each run, a line for each set of weights."""
    panels = [(run, number) for run in report.runs for number in _networks(run)]
    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    figure, grid = new_figure(1.5 + _WIDE * across, 0.9 + _HIGH * down, down, across)
    places = [place for line in grid for place in line]
    colours = _colours(report)
    lines: dict[str, Any] = {}
    for (run, number), panel in zip(panels, places, strict=False):
        for point in run.points:
            network = point.networks[number]
            x, y = range(len(network.mean)), network.mean
            style = {"color": colours[point.label], "marker": "o", "markersize": 3.5}
            if point.file is None:
                style |= {"linestyle": "--", "marker": "s"}
            (lines[point.label],) = panel.plot(x, y, linewidth=1.5, **style)
        # Of the last weights alone: those of all would cover each other.
        spread = np.nan_to_num(network.std)
        low, high = np.clip(y - spread, 0, 1), np.clip(y + spread, 0, 1)
        panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        panel.set_title(_title(run, number), fontsize="medium")
        panel.set_xlabel("layer (0: initial embedding)")
        panel.set_xticks(_ticks(len(run.points[0].networks[number].mean)))
    for panel in places[len(panels) :]:
        panel.set_visible(False)
    limits = [panel.get_ylim() for panel in places[: len(panels)]]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for number, panel in enumerate(places[: len(panels)]):
        panel.set_ylim(low, high)
        panel.ticklabel_format(axis="y", useOffset=False)
        if number % across == 0:
            panel.set_ylabel("heterogeneity, share of its maximum")
    order = sorted(lines, key=list(colours).index)
    figure.legend(
        [lines[label] for label in order],
        order,
        loc="outside right center",
        frameon=False,
        fontsize="small",
    )
    figure.suptitle(
        f"Heterogeneity of hidden tokens\n{words(report.choices.similarity)}", fontsize="medium"
    )
    figure.supxlabel(_caption(report), fontsize="small", color=QUIET)
    return figure


def affinity_figure(report: Report) -> Figure:
    """Draw affinity maps of one image: a row for each set of weights, a column a layer."""
    rows = _rows(report)
    across = max(len(network.maps) for _, _, network in rows)
    figure, grid = new_figure(
        0.6 + across * (_SIDE + 0.2), 1.0 + len(rows) * (_SIDE + 0.3), len(rows), across
    )
    above: list[int] = []
    for (run, name, network), line in zip(rows, grid, strict=True):
        for panel in line[len(network.maps) :]:
            panel.set_axis_off()
        for number, ((layer, values), panel) in enumerate(
            zip(network.maps.items(), line, strict=False)
        ):
            _map(panel, values, run.hidden, named=number == 0)
            if list(network.maps) != above:
                panel.set_title(f"layer {layer}", fontsize="small")
        line[0].set_ylabel(name, fontsize="small", labelpad=8)
        above = list(network.maps)
    choices = report.choices
    figure.suptitle(
        f"Affinities of one image, number {choices.image}: softmax of {words(choices.similarity)}",
        fontsize="medium",
    )
    figure.supxlabel(
        "a row is a token that looks, a column one that is looked at; colours from\n"
        "the least to nearly the most of each map, without tokens' looks at themselves",
        fontsize="small",
        color=QUIET,
    )
    return figure


def _map(panel: Any, values: np.ndarray, hidden: int, named: bool) -> None:
    """Draw one map with its quadrants."""
    count = len(values)
    shown = values.astype(float)
    np.fill_diagonal(shown, np.nan)  # would be much the brightest
    inside = shown[~np.isnan(shown)]
    low, high = float(inside.min()), float(np.percentile(inside, _BRIGHTEST))
    scale = matplotlib().colormaps["viridis"].with_extremes(bad="white")
    panel.imshow(shown, vmin=low, vmax=max(high, low + 1e-12), cmap=scale, interpolation="nearest")
    panel.grid(visible=False)
    for draw in (panel.axhline, panel.axvline):
        draw(hidden - 0.5, color="white", linewidth=1.2)
    panel.spines[:].set_visible(False)
    middles = [(hidden - 1) / 2, (hidden + count - 1) / 2]
    panel.set_xticks(middles, ["hidden", "visible"])
    panel.set_yticks(
        middles, ["hidden", "visible"] if named else ["", ""], rotation=90, va="center"
    )
    panel.tick_params(length=0, labelsize="x-small")


def _rows(report: Report) -> list[tuple[RunLook, str, Network]]:
    """Return a few weights of each run, the first and the last among them."""
    several = len(report.runs) > 1
    each = max(1, min(3, _ROWS // len(report.runs)))
    rows = []
    for run in report.runs:
        for point in evenly(run.points, each):
            for number in _networks(run):
                name = f"{run.name}\n{point.label}" if several else point.label
                rows.append((run, name + _which(run, number), point.networks[number]))
    return rows[:_ROWS]


def _networks(run: RunLook) -> range:
    return range(len(run.points[0].networks))


def _which(run: RunLook, number: int) -> str:
    return f", network {number}" if len(_networks(run)) > 1 else ""


def _title(run: RunLook, number: int) -> str:
    share = run.hidden / run.mask["patches"]
    return f"{run.name}{_which(run, number)} ({run.method}, {share:.0%} hidden)"


def _caption(report: Report) -> str:
    images = sorted({run.images for run in report.runs})
    counted = " or ".join(map(str, images))
    parts = [f"{counted} images, masks of seed {report.choices.seed}"]
    if any(count > 1 for count in images):
        parts.append("band: standard deviation over images, of the last weights")
    said = "; ".join(parts)
    if report.choices.similarity.kind in ("raw", "scaled"):
        said += (
            "\nheterogeneity also sinks where norms grow with depth: compare with untrained weights"
        )
    return said


def _colours(report: Report) -> dict[str, Any]:
    """Return colours from light to dark by epoch, the same in all panels; grey if untrained."""
    points: dict[str, Point] = {}
    for run in report.runs:
        for point in run.points:
            points.setdefault(point.label, point)
    order = sorted(points.values(), key=lambda p: (p.epoch is None, p.epoch or 0.0, p.label))
    trained = [point for point in order if point.file is not None]
    scale = matplotlib().colormaps["viridis_r"]
    steps = np.linspace(0.15, 0.95, len(trained)) if len(trained) > 1 else [0.75]
    found = {p.label: scale(step) for p, step in zip(trained, steps, strict=True)}
    return {p.label: found.get(p.label, QUIET) for p in order}


def _ticks(layers: int) -> list[int]:
    step = max(1, -(-layers // 13))
    return list(range(0, layers, step))
