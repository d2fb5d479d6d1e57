"""Pictures of pre-training runs: heterogeneity by layer, and affinity maps of one image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.measure.look import Look, words
from foveate.measure.style import QUIET, evenly, new_figure
from foveate.measure.table import select
from foveate.viz.colours import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["affinity_figure", "layers_figure"]

_WIDE, _HIGH = 3.9, 3.3  # inches of a panel
_ACROSS = 3  # panels in a row
_SIDE = 1.9  # inches of a map
_ROWS = 6  # of maps
_BRIGHTEST = 99  # per cent of a map's values are below its brightest colour


def layers_figure(found: Look) -> Figure:
    """Draw heterogeneity by layer: a panel for each run, a line for each set of weights."""
    panels = list(select(found.table, part="layers").groupby(["run", "draw"], sort=False))
    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    figure, grid = new_figure(1.5 + _WIDE * across, 0.9 + _HIGH * down, down, across)
    places = [place for line in grid for place in line]
    for panel in places[len(panels) :]:
        panel.set_visible(False)
    colours = _colours(found)
    lines: dict[str, Any] = {}
    for ((run, number), own), panel in zip(panels, places, strict=False):
        for label, group in own.groupby("method", sort=False):
            values = group.pivot(index="at", columns="metric", values="value")
            x, mean = values.index, values["mean"]
            style = {"color": colours[label], "marker": "o", "markersize": 3.5}
            if label == "untrained":
                style |= {"linestyle": "--", "marker": "s"}
            (lines[label],) = panel.plot(x, mean, linewidth=1.5, **style)
        if "std" in values:  # of the last weights alone: those of all would cover each other
            low, high = ((mean + sign * values["std"]).clip(0, 1) for sign in (-1, 1))
            panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        about = found.about["runs"][run]
        share = about["mask"]["hidden"] / about["mask"]["patches"]
        title = f"{run}{_which(found, run, number)} ({about['method']}, {share:.0%} hidden)"
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("layer (0: initial embedding)")
        panel.set_xticks(range(0, len(x), max(1, -(-len(x) // 13))))
    limits = [limit for panel in places[: len(panels)] for limit in panel.get_ylim()]
    for number, panel in enumerate(places[: len(panels)]):
        panel.set_ylim(min(limits), max(limits))
        panel.ticklabel_format(axis="y", useOffset=False)
        if number % across == 0:
            panel.set_ylabel("heterogeneity, share of its maximum")
    order = [label for label in colours if label in lines]
    figure.legend(
        [lines[label] for label in order],
        order,
        loc="outside right center",
        frameon=False,
        fontsize="small",
    )
    figure.suptitle(f"Heterogeneity of hidden tokens\n{words(found.about)}", fontsize="medium")
    figure.supxlabel(_caption(found), fontsize="small", color=QUIET)
    return figure


def affinity_figure(found: Look) -> Figure:
    """Draw affinity maps of one image: a row for each set of weights, a column a layer."""
    rows = _rows(found)
    across = max(len(found.maps[key]) for key in rows)
    figure, grid = new_figure(
        0.6 + across * (_SIDE + 0.2), 1.0 + len(rows) * (_SIDE + 0.3), len(rows), across
    )
    above: list[int] = []
    for (run, label, network), line in zip(rows, grid, strict=True):
        maps = found.maps[run, label, network]
        hidden = found.about["runs"][run]["mask"]["hidden"]
        for panel in line[len(maps) :]:
            panel.set_axis_off()
        for (layer, values), panel in zip(maps.items(), line, strict=False):
            _map(panel, values, hidden, named=panel is line[0])
            if list(maps) != above:
                panel.set_title(f"layer {layer}", fontsize="small")
        name = f"{run}\n{label}" if len(found.about["runs"]) > 1 else label
        line[0].set_ylabel(name + _which(found, run, network), fontsize="small", labelpad=8)
        above = list(maps)
    figure.suptitle(
        f"Affinities of one image, number {found.about['image']}: softmax of {words(found.about)}",
        fontsize="medium",
    )
    figure.supxlabel(
        "row: a token; column: the token that it is compared with; colours from the\n"
        "lowest to nearly the highest value of each map, without the diagonal",
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


def _rows(found: Look) -> list[tuple[str, str, int]]:
    """Return a few weights of each run, the first and the last among them."""
    each = max(1, min(3, _ROWS // len(found.about["runs"])))
    rows = []
    for run, about in found.about["runs"].items():
        for label in evenly(list(about["epochs"]), each):
            rows += [key for key in found.maps if key[:2] == (run, label)]
    return rows[:_ROWS]


def _which(found: Look, run: str, number: int) -> str:
    """Name a network where the run has several."""
    several = any(name == run and other > 0 for name, _, other in found.maps)
    return f", network {number}" if several else ""


def _caption(found: Look) -> str:
    images = sorted({run["images"] for run in found.about["runs"].values()})
    said = f"{' or '.join(map(str, images))} images, masks of seed {found.about['mask_seed']}"
    if any(count > 1 for count in images):
        said += "; band: standard deviation over images, of the last weights"
    if found.about["similarity"] in ("raw", "scaled"):
        said += (
            "\nheterogeneity also falls where norms grow with depth: compare with untrained weights"
        )
    return said


def _colours(found: Look) -> dict[str, Any]:
    """Return colours from light to dark by epoch, the same in all panels; grey if untrained."""
    epochs: dict[str, float | None] = {}
    for run in found.about["runs"].values():
        epochs = run["epochs"] | epochs
    order = sorted(epochs, key=lambda label: (epochs[label] is None, epochs[label] or 0.0, label))
    trained = [label for label in order if label != "untrained"]
    scale = matplotlib().colormaps["viridis_r"]
    steps = np.linspace(0.15, 0.95, len(trained)) if len(trained) > 1 else [0.75]
    shades = {label: scale(step) for label, step in zip(trained, steps, strict=True)}
    return {label: shades.get(label, QUIET) for label in order}
