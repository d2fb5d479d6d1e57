"""metrics.csv of a run: one line for each time something was logged, also across resumes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from foveate.files import write_whole

__all__ = ["MetricsFile", "read_metrics"]


class MetricsFile(Logger):
    """Appends lines; a new column, which is rare, rewrites the file.

    Lightning's own CSV logger throws an earlier file away, so a resumed run would lose its past.

    Args:
        path: of the file.
        resumed: the update a run goes on from; later lines, which a killed run had written, go.
    """

    def __init__(self, path: Path, resumed: int | None = None) -> None:
        super().__init__()
        self.path = path
        self._rows: list[dict[str, str]] = []
        self._columns: dict[str, None] = {"step": None, "epoch": None}
        self._take_up(resumed)

    @rank_zero_only
    def _take_up(self, resumed: int | None) -> None:
        """Keep what an earlier process wrote, as far as it counts; one process sees to the file."""
        if not self.path.is_file():
            return
        if resumed is None:
            self.path.unlink()
            return
        self._rows = [row for row in read_metrics(self.path) if int(row["step"]) < resumed]
        for row in self._rows:
            self._columns |= dict.fromkeys(row)
        self._rewrite()

    @property
    def name(self) -> str:
        """Return what Lightning asks every logger for."""
        return "metrics"

    @property
    def version(self) -> str:
        """Return what Lightning asks every logger for."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings stand in recipe.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one line."""
        row = {"step": str(step or 0)}
        row |= {name: f"{value:.6g}" for name, value in metrics.items() if name != "epoch"}
        if "epoch" in metrics:
            row["epoch"] = str(int(metrics["epoch"]))
        new = row.keys() - self._columns.keys()
        self._columns |= dict.fromkeys(row)
        self._rows.append(row)
        if new or not self.path.is_file():
            self._rewrite()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, list(self._columns)).writerow(row)

    def _rewrite(self) -> None:
        def write(partial: str) -> None:
            with open(partial, "w", newline="") as file:
                writer = csv.DictWriter(file, list(self._columns))
                writer.writeheader()
                writer.writerows(self._rows)

        write_whole(self.path, write)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the rows of a metrics.csv without empty cells, and ignore a last line cut short."""
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("step", "").isdecimal()]
