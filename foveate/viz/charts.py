"""Give all charts one look: one set of colours for lines, and one kind of axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.viz.colours import OKABE_ITO, matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "QUIET", "line_look", "new_figure"]

# Yellow is too light for a line on white. Markers and dashes tell lines apart as well.
COLOURS = [f"#{r:02X}{g:02X}{b:02X}" for r, g, b in (OKABE_ITO[i] for i in (4, 5, 2, 6, 0, 1))]
QUIET = "#666666"
_MARKERS = "osv^DPX"
_DASHES = ("-", "--", ":")


def line_look(number: int) -> dict[str, Any]:
    """Return the colour, marker and dashes of the line with this number."""
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
