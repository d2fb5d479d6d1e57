"""Read the scores of a run by epoch, from the metrics that it writes during training."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from foveate.registry import suggest

__all__ = ["by_seconds", "columns", "curve", "seconds"]


def curve(run: Path, metric: str) -> dict[float, float]:
    """Return a metric by the number of finished epochs; the last value counts if there are several.

    Args:
        run: the folder of a run, or a CSV file with a column "epoch" and one of the metric's name.
            In what training writes, which has a column "step", epochs are counted from 0 and
            scored at their end; in any other file they are epochs of training as they stand.
        metric: the column to read; lines without a value in it are skipped.
    """
    path, lines, names = _read(run)
    for name in ("epoch", metric):
        if name not in names:
            raise ValueError(f"{path}: {suggest('column', name, names)}")
    over = 1 if "step" in names else 0
    found: dict[float, float] = {}
    for number, line in enumerate(lines, start=2):
        epoch, value = line["epoch"], line[metric]
        if not value:
            continue
        try:
            found[float(epoch) + over] = float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}, line {number}: epoch {epoch!r} and {metric} {value!r} must be numbers"
            ) from None
        if not math.isfinite(float(value)):
            raise ValueError(f"{path}, line {number}: {metric} is {value}, expected a number")
    if not found:
        raise ValueError(f"{path} has no value of {metric}: nothing was scored")
    return dict(sorted(found.items()))


def seconds(run: Path) -> dict[float, float]:
    """Return the seconds of training after each epoch, from the file that the run writes."""
    path = run / "seconds.csv"
    if not path.is_file():
        raise ValueError(f"{run} does not say how long its epochs took: {path.name} is not there")
    return {0.0: 0.0, **curve(path, "seconds")}


def by_seconds(scores: Mapping[float, float], took: Mapping[float, float]) -> dict[float, float]:
    """Return scores by seconds instead of epochs."""
    unknown = [epoch for epoch in scores if epoch not in took]
    if unknown:
        raise ValueError(f"how long epoch {unknown[0]:g} took is not known")
    return {took[epoch]: score for epoch, score in scores.items()}


def columns(run: Path) -> list[str]:
    """Return the names of all columns of a run's metrics."""
    return _read(run)[2]


def _read(run: Path) -> tuple[Path, list[dict[str, str]], list[str]]:
    path = run / "metrics.csv" if run.is_dir() else run
    try:
        text = path.read_text(encoding="utf-8")
        # A run that was killed may have left half a line, without its end.
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        return path, list(reader), list(reader.fieldnames or ())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected the metrics of a run") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not readable CSV: {error}") from error
