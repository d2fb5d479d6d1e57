"""How fast runs get better: accuracy over epochs, from the metrics that training writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.registry import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["convergence", "read_metric"]


def convergence(
    runs: Mapping[str, Path], *, metric: str = "val/accuracy", label: str = "accuracy, %"
) -> Figure:
    """Draw a metric of several runs over their epochs.

    Args:
        runs: for each run, by name, its ``metrics.csv`` or the folder that holds it.
        metric: the column to draw.
        label: what it is, with its unit.
    """
    from foveate.evaluate.figures import Line, lines_figure

    if not runs:
        raise ValueError("no run was given: name at least one metrics.csv")
    lines = []
    for name, path in runs.items():
        points = read_metric(path, metric)
        # Epochs are counted from 0 and validated at their end, when one more is over.
        lines.append(Line(name, tuple(epoch + 1 for epoch in points), tuple(points.values())))
    return lines_figure(lines, across="epochs of training", up=label)


def read_metric(path: Path, metric: str = "val/accuracy") -> dict[float, float]:
    """One metric of a run by epoch; of an epoch that was written twice, the last value.

    Args:
        path: a ``metrics.csv`` with a column "epoch", or the folder that holds it.
        metric: the column to read; lines without a value in it are of other things.
    """
    path = Path(path)
    path = path / "metrics.csv" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        # A run that was killed may have left half a line, without its end.
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        lines, names = list(reader), list(reader.fieldnames or ())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected the metrics of a run") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not readable CSV: {error}") from error
    for name in ("epoch", metric):
        if name not in names:
            raise ValueError(f"{path}: {suggest('column', name, names)}")
    found: dict[float, float] = {}
    for number, line in enumerate(lines, start=2):
        epoch, value = line["epoch"], line[metric]
        if not value:
            continue
        try:
            found[float(epoch)] = float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}, line {number}: epoch {epoch!r} and {metric} {value!r} must be numbers"
            ) from None
    if not found:
        raise ValueError(f"{path} has no value of {metric}: nothing was validated")
    return dict(sorted(found.items()))
