"""How pictures look: one set of colours, one kind of axes, files that are written whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.files import write_whole
from foveate.viz.colours import OKABE_ITO, matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "QUIET", "line_look", "new_figure", "save"]

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


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole: .svg, .png or .pdf."""
    kind = path.suffix.removeprefix(".")
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: figure.savefig(partial, format=kind, **options))
