"""The long table, in which every measured number is a row.

Columns:
    run: the model, or what a comparison calls it.
    part: "accuracy", "occlusion", "pruning", "tokens", "speed", "training", "probe", "layers", ...
    method: that runs on the model; "" for the model as it is.
    rate: of the method; empty where it has none.
    seed: of training; empty for a model that was opened.
    draw: repetition of the measurement itself: number of the mask seed, or the timed round.
    at: what else the number depends on: share dropped, epoch, block, layer or batch.
    metric, value: what was measured.
    commit, machine: which code measured it, and where.

A table lies in a CSV file. The JSON file beside it says how it came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.convert.results import TABLE_FORMAT
from foveate.files import read_json, write_text

try:
    import pandas as pd
except ImportError as error:
    raise ValueError(f"tables need pandas ({error}): pip install 'foveate[train]'") from error

__all__ = [
    *("COLUMNS", "KEYS", "Results", "formatted", "frame", "grid", "one", "over_seeds", "rows"),
    *("said", "select"),
]

_WORDS = ("run", "part", "method", "metric", "commit", "machine")
_REAL, _WHOLE = ("rate", "at", "value"), ("seed", "draw")
COLUMNS = (
    *("run", "part", "method", "rate", "seed", "draw", "at", "metric", "value"),
    *("commit", "machine"),
)
# The columns that identify a number, apart from repetitions.
KEYS = ["run", "part", "method", "rate", "at", "metric"]
MISSING = "missing"


def rows(part: str, values: Mapping[str, Any], **keys: Any) -> list[dict[str, Any]]:
    """Return a row for each value that is not None.

    Args:
        part: of the measurement.
        values: numbers by metric.
        keys: further columns.
    """
    return [
        {"part": part, "metric": metric, "value": value, **keys}
        for metric, value in values.items()
        if value is not None
    ]


def frame(found: Iterable[Mapping[str, Any]] | pd.DataFrame, **columns: Any) -> pd.DataFrame:
    """Return rows as a table with all columns.

    Args:
        found: rows, or a table.
        columns: values that all rows have.
    """
    table = found if isinstance(found, pd.DataFrame) else pd.DataFrame(list(found))
    table = table.assign(**columns).reindex(columns=list(COLUMNS))
    for name in _WORDS:
        table[name] = table[name].astype(object).where(table[name].notna(), "").astype(str)
    for name in _REAL:
        table[name] = pd.to_numeric(table[name]).astype(float)
    for name in _WHOLE:
        table[name] = pd.to_numeric(table[name]).astype(float).round().astype("Int64")
    return table


def select(table: pd.DataFrame, **keys: Any) -> pd.DataFrame:
    """Return the rows with these values; None is an empty cell, a list is any of its values."""
    chosen = pd.Series(True, index=table.index)
    for name, value in keys.items():
        column = table[name]
        if value is None:
            chosen &= column.isna()
        elif isinstance(value, (list, tuple, set)):
            chosen &= column.isin(list(value))
        else:
            chosen &= (column == value).fillna(False).astype(bool)
    return table[chosen]


def one(table: pd.DataFrame, metric: str, **keys: Any) -> float:
    """Return the only number of a metric that has these values; ValueError for none or several."""
    found = select(table, metric=metric, **keys)["value"]
    if len(found) != 1:
        words = ", ".join(f"{name}={value}" for name, value in {"metric": metric, **keys}.items())
        raise ValueError(f"the table has {len(found)} rows with {words}, expected one")
    return float(found.iloc[0])


def over_seeds(table: pd.DataFrame, by: Sequence[str] = KEYS) -> pd.DataFrame:
    """Return mean, standard deviation and number of values for each key, in the table's order.

    Where models were trained with several seeds, the repetitions of each are averaged first, so
    the deviation is that of training. Without such seeds it is that of the repetitions.

    Args:
        table: any rows of a table.
        by: the columns that stay.
    """
    keys = [*by]
    if table["seed"].notna().any():
        again = [*keys, "seed"]
        table = table.groupby(again, dropna=False, sort=False)["value"].mean().reset_index()
    grouped = table.groupby(keys, dropna=False, sort=False)["value"]
    return grouped.agg(["mean", "std", "count"]).reset_index()


def grid(
    table: pd.DataFrame, rows: str | list[str], columns: str = "metric", values: str = "value"
) -> pd.DataFrame:
    """Return one number, or its text, by row and column, both in the table's order; NaN for none.

    Args:
        table: rows of a table, of which no two have the same place.
        rows: the columns of the table that name a row.
        columns: the one that names a column.
        values: what stands in the grid.
    """
    found = table.pivot(index=rows, columns=columns, values=values)
    order = table.set_index(rows).index.unique()
    return found.reindex(index=order, columns=table[columns].unique())


def formatted(values: pd.Series, form: str) -> pd.Series:
    """Return numbers as text; missing ones stay NaN."""
    return values.map(lambda value: format(value, form), na_action="ignore").astype(object)


def said(mean: float, std: float = float("nan"), digits: int = 2) -> str:
    """Return a mean as text, with its standard deviation if there is one."""
    if pd.isna(mean):
        return MISSING
    spread = "" if pd.isna(std) else f" ± {std:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"


@dataclass
class Results:
    """A table, and how it was made.

    Attributes:
        table: the rows, with the columns of this file.
        about: command, commit, machine and settings; facts of models; and everything else that is
            not a number.
    """

    table: pd.DataFrame
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> list[Path]:
        """Write the JSON file ``path`` and the CSV file beside it, and return both paths."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".csv")
        # The JSON says how many rows there are and is written last: it stands for a whole table.
        path.unlink(missing_ok=True)
        write_text(beside, self.table.to_csv(index=False, lineterminator="\n"))
        content = {"format": TABLE_FORMAT, **self.about, "rows": len(self.table)}
        write_text(path, json.dumps(content, indent=1) + "\n")
        return [path, beside]

    @classmethod
    def load(cls, path: Path, program: str = "foveate eval") -> Results:
        """Read what ``save`` wrote; ``program`` names the writer in the error about other files."""
        about = read_json(path, f"{path} does not exist; expected what {program} wrote")
        wrong = f"{path} is not what {program} writes"
        if not isinstance(about, dict) or not isinstance(about.get("format"), int):
            raise ValueError(f"{wrong}: it has no number 'format'")
        number = about.pop("format")
        if number != TABLE_FORMAT:
            age = "a newer" if number > TABLE_FORMAT else "an earlier"
            raise ValueError(f"{path} is of {age} version of foveate: measure again with this one")
        beside = path.with_suffix(".csv")
        try:
            found = pd.read_csv(beside, dtype=str, keep_default_na=False)
        except FileNotFoundError:
            raise ValueError(f"{beside} does not exist; it belongs to {path}") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{beside} is not a table of foveate: {error}") from error
        if tuple(found.columns) != COLUMNS:
            raise ValueError(
                f"{beside} is not a table of foveate: its columns are {', '.join(found.columns)}"
            )
        if len(found) != about.pop("rows", None):
            raise ValueError(f"{beside} was cut short or changed: it has {len(found)} rows")
        try:
            for name in (*_REAL, *_WHOLE):  # Python's own reading gives every digit back
                found[name] = [float(text) if text else None for text in found[name]]
        except ValueError as error:
            raise ValueError(f"{beside} has a value that is not a number: {error}") from error
        return cls(frame(found), about)
