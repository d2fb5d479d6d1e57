"""The result of a search: the table, as text and picture, and the files beside the choice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core import ReducedViT
from foveate.files import write_text
from foveate.measure.sheets import Sheet
from foveate.measure.style import QUIET, line_look, new_figure, save
from foveate.measure.table import formatted, pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "Tuned", "speeds"]

_FORMAT = 1
_ACROSS = {
    "ms": "times as fast as the dense model",
    "macs": "times fewer multiply-adds than the dense model",
}
_AT_TARGET = ("dense", "choice", "schedule", "constant")
COLUMNS = (
    *("role", "method", "options", "schedule", "tokens", "macs", "predicted_ms", "predicted"),
    *("measured_ms", "measured", "measured_low", "measured_high"),
    *("choosing", "reporting", "same_choosing", "same_reporting", "frontier"),
)


def speeds(table: pd.DataFrame) -> pd.Series:
    """Return how many times as fast each row is: as measured, or as predicted if it was not timed.

    With a target in multiply-adds nothing is predicted about time: how many times fewer they are.
    """
    if _in_time(table):
        return table["measured"].fillna(table["predicted"])
    return table["predicted"]


def _by_speed(table: pd.DataFrame) -> pd.DataFrame:
    return table.loc[speeds(table).sort_values(kind="stable").index]


def _in_time(table: pd.DataFrame) -> bool:
    return bool(table["predicted_ms"].notna().any())


@dataclass(frozen=True, eq=False)
class Tuned:
    """The result of a search.

    Attributes:
        path: folder with the choice, which ``foveate.load`` opens, the table and the picture.
        table: one row for the dense model, for each method at its constant rate and with its best
            schedule, for the choice, and for other speeds; see ``docs/tune.md`` for the columns.
        choice: the chosen method, as a string for ``foveate.apply``.
        model: the model with the chosen method.
        about: settings, images and machine.
        notes: what else to know about the result.
        commands: commands that would raise the agreement by training.
    """

    path: Path
    table: pd.DataFrame = field(repr=False)
    choice: str
    model: ReducedViT = field(repr=False)
    about: Mapping[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def row(self) -> pd.Series:
        """The row of the choice."""
        return self.table[self.table["role"] == "choice"].iloc[0]

    # In words ------------------------------------------------------------------------------------

    def sheets(self) -> list[Sheet]:
        """Return the tables for the terminal: all that meets the target, then the frontier."""
        at_target = self.table[self.table["role"].isin(_AT_TARGET)]
        dense = at_target["role"] == "dense"
        ranked = pd.concat([at_target[dense], at_target[~dense].sort_values("choosing")])
        frontier = _by_speed(self.table[self.table["frontier"]])
        half = f"{self.about['choosing']} images choose, {self.about['reporting']} report"
        return [
            Sheet(
                f"Agreement with the dense model at {self.about['target']}: {half}",
                self._words(ranked),
                words=("", "method", "schedule", "tokens"),
                notes=[self._legend()],
                spare=("tokens", "GMACs", "MMACs"),
            ),
            Sheet(
                "Frontier: nothing that was tried agrees better at this speed, on the images that "
                "report",
                self._words(frontier).drop(columns=""),
                words=("method", "schedule", "tokens"),
                spare=("tokens", "GMACs", "MMACs"),
            ),
        ]

    def _words(self, rows: pd.DataFrame) -> pd.DataFrame:
        table = pd.DataFrame(index=rows.index)
        table[""] = ["->" if role == "choice" else "" for role in rows["role"]]
        table["method"], table["schedule"] = rows["method"], rows["schedule"]
        table["tokens"] = rows["tokens"].map(_runs)
        unit, size = ("GMACs", 1e9) if self.table["macs"].max() >= 1e9 else ("MMACs", 1e6)
        table[unit] = formatted(rows["macs"] / size, ".3g")
        table["predicted"] = formatted(rows["predicted"], ".2f") + "x"
        if rows["measured"].notna().any():
            table["measured"] = formatted(rows["measured"], ".2f") + "x"
        for half in ("choosing", "reporting"):
            table[f"{self._score}, {half}"] = formatted(self._shown(rows[half]), self._form)
        if self.about["judge"] == "classes":
            table["same %, reporting"] = formatted(100 * rows["same_reporting"], ".1f")
        return table.fillna("-")

    @property
    def _score(self) -> str:
        return "KL" if self.about["judge"] == "classes" else "similarity"

    @property
    def _form(self) -> str:
        return ".2e" if self.about["judge"] == "classes" else ".4f"

    def _shown(self, distance: pd.Series) -> pd.Series:
        return distance if self.about["judge"] == "classes" else 1 - distance

    def _legend(self) -> str:
        if self.about["judge"] == "classes":
            found = "KL: divergence of the classes; same: images with the same most likely class."
        else:
            found = "Similarity: mean cosine over all patches, after subtracting the mean feature."
        found += f" Predicted: {self._across}, {self.about['predicted']}."
        timed = self.about["measured"]
        return found + f" Measured: in {timed}." * (timed is not None)

    @property
    def _across(self) -> str:
        return _ACROSS["ms" if _in_time(self.table) else "macs"]

    def lines(self) -> list[str]:
        """Return the choice, the notes, and the commands to type next, one a line."""
        found = [f"choice   {self.choice}"]
        found += [f"note     {note}" for note in self.notes]
        found += [f"next     {command}" for command in self.commands]
        return found

    # As a picture --------------------------------------------------------------------------------

    def plot(self) -> Figure:
        """Draw agreement over speed, one line for each method, and tokens over the blocks."""
        figure, ((left, right),) = new_figure(11.5, 4.4, columns=2)
        table = self.table[self.table["role"] != "dense"]
        for number, (method, rows) in enumerate(table.groupby("method", sort=False)):
            look = line_look(number)
            constant = rows[rows["role"] == "constant"]
            line = rows[rows["role"] != "constant"]
            if (line["role"] == "frontier").all():  # no schedule is better than its constant rate
                line = rows
            line = _by_speed(line)
            left.plot(speeds(line), self._shown(line["reporting"]), label=method, **look)
            left.plot(
                speeds(constant),
                self._shown(constant["reporting"]),
                marker=look["marker"],
                markerfacecolor="white",
                color=look["color"],
                linestyle="none",
            )
        chosen = table[table["role"] == "choice"]
        left.plot(
            speeds(chosen),
            self._shown(chosen["reporting"]),
            "*",
            color="black",
            markersize=13,
            label="choice",
            linestyle="none",
        )
        words = {"classes": "divergence of classes (KL), lower is better"}
        left.set_ylabel(words.get(self.about["judge"], "similarity of features, higher is better"))
        if self.about["judge"] == "classes" and (table["reporting"] > 0).all():
            left.set_yscale("log")
        timed = _in_time(table) and self.about["measured"] is not None
        source = "as timed; what was not timed: " if timed else ""
        left.set_xlabel(f"{self._across},\n{source}{self.about['predicted']}")
        left.set_title(f"on the {self.about['reporting']} images that report", fontsize="medium")
        left.plot([], [], "o", color=QUIET, markerfacecolor="white", label="hollow: constant rate")
        self._draw_tokens(right)
        left.figure.legend(
            handles=left.get_legend_handles_labels()[0],
            loc="outside lower center",
            ncols=6,
            frameon=False,
            fontsize="small",
        )
        return figure

    def _draw_tokens(self, axes: Any) -> None:
        chosen = self.row
        constant = self.table[
            (self.table["role"] == "constant") & (self.table["method"] == chosen["method"])
        ]
        shown = [("choice", chosen, "black", "-")]
        shown += [("constant rate", row, QUIET, "--") for _, row in constant.iterrows()]
        for label, row, colour, dashes in shown:
            blocks = range(len(row["tokens"]))
            axes.step(
                blocks, row["tokens"], where="mid", label=label, color=colour, linestyle=dashes
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("block")
        axes.set_ylabel("tokens that the block feeds forward")
        axes.set_title(f"{chosen['method']}, {chosen['schedule']}", fontsize="medium")
        axes.legend(frameon=False, fontsize="small")

    # As files ------------------------------------------------------------------------------------

    def write(self) -> list[Path]:
        """Write the table as CSV, everything as JSON, and the picture; return the files."""
        table = self.table.assign(tokens=[" ".join(map(str, row)) for row in self.table["tokens"]])
        beside, path = self.path / "tune.csv", self.path / "tune.json"
        write_text(beside, table.to_csv(index=False, lineterminator="\n"))
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        content = {
            "format": _FORMAT,
            "choice": self.choice,
            **self.about,
            "notes": list(self.notes),
            "commands": list(self.commands),
            "table": rows,
        }
        write_text(path, json.dumps(content, indent=1) + "\n")
        pictures = (self.path / f"frontier{kind}" for kind in (".svg", ".png"))
        return [path, beside, *save(self.plot(), *pictures)]


def _runs(tokens: list[int]) -> str:
    """Format token counts, with equal neighbours written once: 197x3 140x3."""
    groups = ((count, len(list(same))) for count, same in itertools.groupby(tokens))
    return " ".join(f"{count}x{times}" if times > 1 else str(count) for count, times in groups)
