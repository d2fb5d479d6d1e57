"""The result of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from foveate.train.logs import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Result", "better_weights", "is_better"]


class Result(Mapping[str, Any]):
    """The content of result.json by its keys, and the other results in the run's folder.

    Attributes:
        path: the folder of the run.
        model: the trained model, in evaluation mode on the CPU.
    """

    def __init__(self, path: Path, content: dict[str, Any], model: nn.Module | None = None) -> None:
        self.path, self.model, self._content = path, model, content

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:g}" for name, value in self.metrics.items())
        return f"Result({self.path}: {scores})"

    @property
    def metrics(self) -> dict[str, float]:
        """Return the scores by name."""
        known = ("updates", "epochs", "minutes_of_this_process", "minutes")
        return {
            name: value
            for name, value in self.items()
            if isinstance(value, (int, float)) and name not in known
        }

    @cached_property
    def history(self) -> DataFrame:
        """Return all logged values: a row for each update or evaluation, a column for each name."""
        import pandas

        file = self.path / "metrics.csv"
        if not file.is_file():
            raise ValueError(f"{self.path} logged nothing while it ran: it has no {file.name}")
        table = pandas.DataFrame(read_metrics(file)).apply(pandas.to_numeric)
        return table.set_index("step")

    def plot(self) -> Figure:
        """Draw losses on the left and the score on the right, over the updates."""
        from matplotlib.figure import Figure

        history, score = self.history, str(self.get("score", "accuracy"))
        score = "accuracy" if score == "loss" else score
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, what in zip(figure.subplots(1, 2), ("loss", score), strict=True):
            for column in history:
                split, _, name = str(column).partition("/")
                if name.removesuffix("_ema") == what and split in ("train", "val"):
                    values = history[column].dropna()
                    mean = ", running mean" if name.endswith("_ema") else ""
                    marker = "o" if split == "val" else None
                    label = {"train": "training", "val": "validation"}[split] + mean
                    axes.plot(values.index, values, marker=marker, markersize=3, label=label)
            axes.set_xlabel("update")
            axes.set_title("accuracy, %" if what == "accuracy" else what)
            if axes.has_data():
                axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def better_weights(result: Mapping[str, Any], out: Path) -> tuple[Path, float]:
    """Return the folder of the better weights of a run, the last or the best, and their score."""
    name, best = result["score"], result.get("best", {})
    if best.get("model", "").startswith("best/") and is_better(name, best["score"], result[name]):
        return out / "best", best["score"]
    return out, result[name]


def is_better(name: str, one: float, other: float) -> bool:
    """Tell whether a score is better than another: a divergence (kl) is where it is less."""
    return one < other if name == "kl" else one > other
