"""Keep the record of a saved model: the run that made it, and what was measured of it.

A record is made to be shared, so it names data and files without their folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.files import read_json, write_text

__all__ = ["RECORD", "add_measured", "drop_record", "read_record", "write_record"]

RECORD = "record.json"
_FORMAT = 1
# The folder in front of a name, such as "/home/anna/" in "folder:/home/anna/photos".
_FOLDERS = re.compile(r"(?<![\w/\\.~])(?:[A-Za-z]:)?~?[\\/](?:[^\\/:,\s]+[\\/])+(?=[^\\/:,\s])")
_HUB_NAMES = {"fashion-mnist": "zalando-datasets/fashion_mnist"}


def write_record(
    folder: Path,
    recipe: Mapping[str, Any],
    result: Mapping[str, Any],
    scores: Mapping[str, float],
    *,
    weights: str,
) -> None:
    """Write the record of the run that a saved model comes from.

    Args:
        folder: the model's folder.
        recipe: recipe of the run, as plain data.
        result: result of the run, without its scores.
        scores: scores of these weights on the validation images.
        weights: "last", or "best" of those that were validated.
    """
    splits = result.get("splits", {})
    val = splits.get("val", {})
    where = {
        "data": val.get("data"),
        "hub_name": next(iter(_hub_names(val.get("data"))), None),
        "split": "val",
        "held_out": {k: val[k] for k in ("share", "seed") if k in val} or None,
        "images": result.get("images", {}).get("val"),
        "seed": recipe.get("loop", {}).get("seed"),
        "commit": result.get("commit"),
    }
    record = {
        "format": _FORMAT,
        "weights": weights,
        "datasets": _hub_names(splits.get("train", {}).get("data")),
        "measured": [{"metric": k, "value": v, **where} for k, v in scores.items()],
        "evaluated": [],
        "result": dict(result),
        "recipe": dict(recipe),
    }
    _write(folder, record)


def add_measured(folder: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Put numbers of an evaluation into a model's record; they replace those of an earlier one."""
    record = read_record(folder) or {"format": _FORMAT, "measured": []}
    named = [{**one, "hub_name": next(iter(_hub_names(one.get("data"))), None)} for one in found]
    _write(folder, {**record, "evaluated": named})


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(_without_folders(record), indent=1) + "\n")


def drop_record(folder: Path) -> None:
    """Remove the record of the model that a folder held before."""
    (folder / RECORD).unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record in a folder, or None if there is none."""
    path = folder / RECORD
    if not path.exists():
        return None
    found = read_json(path, f"{path} does not exist")
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a record of this version of foveate: delete it")
    return found


def _hub_names(data: Any) -> list[str]:
    """Return the hub's name of a data set, if it has one."""
    kind, _, place = str(data).partition(":")
    if kind == "hf":
        place = place.partition("[")[0]
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not Path(place).exists()
        return [place] if known else []
    return [_HUB_NAMES[kind]] if kind in _HUB_NAMES else []


def _without_folders(value: Any) -> Any:
    """Cut the folders off all absolute paths."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    return [_without_folders(one) for one in value] if isinstance(value, list | tuple) else value
