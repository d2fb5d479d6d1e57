"""How pictures look: one set of colours, one kind of axes, files that are written whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.files import write_whole
from foveate.viz.colours import OKABE_ITO, matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "QUIET", "evenly", "line_look", "new_figure", "save", "stems"]

# Yellow is too light for a line on white; markers and dashes say the same again.
COLOURS = [f"#{r:02X}{g:02X}{b:02X}" for r, g, b in (OKABE_ITO[i] for i in (4, 5, 2, 6, 0, 1))]
QUIET = "#666666"
_MARKERS = "osv^DPX"
_DASHES = ("-", "--", ":")


def line_look(number: int) -> dict[str, Any]:
    """Return colour, marker and dashes of a line, by its number."""
    colours = len(COLOURS)
    return {
        "color": COLOURS[number % colours],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // colours % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1.5,
    }


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[list[Any]]]:
    """Make a figure without a window; return it and its panels, row by row."""
    matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.grid(color="#EEEEEE", zorder=0)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, [list(line) for line in panels]


def save(figure: Figure, *paths: Path) -> list[Path]:
    """Write a picture whole, as each of some files: .svg, .png or .pdf; name them."""
    for path in paths:
        kind = path.suffix.removeprefix(".")
        options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, partial(figure.savefig, format=kind, **options))
    return list(paths)


def stems(names: Iterable[str]) -> list[str]:
    """Return names as files may have them, each its own."""
    found: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")
        found.append(f"{stem}-{len(found) + 1}" if stem in found else stem)
    return found
