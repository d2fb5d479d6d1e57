"""The style of pictures: colours, axes, and files that are written whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.files import write_whole
from foveate.viz.charts import COLOURS, QUIET, line_look, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "QUIET", "evenly", "line_look", "new_figure", "save", "stems"]


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def save(figure: Figure, *paths: Path) -> list[Path]:
    """Write a picture to each of the files (.svg, .png or .pdf), whole, and return the paths."""
    for path in paths:
        kind = path.suffix.removeprefix(".")
        options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, partial(figure.savefig, format=kind, **options))
    return list(paths)


def stems(names: Iterable[str]) -> list[str]:
    """Return distinct names that files may have."""
    found: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")
        found.append(f"{stem}-{len(found) + 1}" if stem in found else stem)
    return found
