"""Read the numbers for a card from the table that ``foveate eval --out`` wrote."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.files import read_json

__all__ = ["TABLE_FORMAT", "read_results"]

TABLE_FORMAT = 2  # of foveate.measure's tables; format 1 was only JSON, by an earlier package
_QUALITY, _SPEED = ("accuracy", "dense"), ("speed", "dense speed")  # parts of the table
_NAMES = {"top1": "accuracy", "top5": "top5", "box_ap": "box_ap", "mask_ap": "mask_ap"}
_NAMES |= {"miou": "miou"}
_OF_SPEED = ("times", "low", "high", "per_second", "rounds")


def read_results(folder: Path, method: str, label: str) -> list[dict[str, Any]]:
    """Return what was measured of one model, each number with what it was measured on.

    Args:
        folder: folder that ``foveate eval --out`` wrote.
        method: method of the model, as tables name it; "" for none.
        label: name of the model, which tells it from others that were evaluated beside it.
    """
    about = read_json(
        folder / "eval.json", f"{folder} has no eval.json: not what foveate eval --out wrote"
    )
    if not isinstance(about, dict) or about.get("format") != TABLE_FORMAT:
        raise ValueError(f"{folder / 'eval.json'} is not what this version of foveate eval writes")
    path = folder / "eval.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(rows) != about.get("rows"):
        raise ValueError(f"{path} was cut short or changed: it has {len(rows)} rows")
    mine = [row for row in rows if row["method"] == method]
    runs = sorted({row["run"] for row in mine})
    if not runs:
        raise ValueError(f"{folder} has no numbers of a model with {method or 'no method'}")
    if len(runs) > 1 and label not in runs:
        raise ValueError(
            f"{folder} has numbers of several models with {method or 'no method'}: "
            f"{', '.join(runs)}; evaluate {label} alone"
        )
    run = label if label in runs else runs[0]
    if label.endswith("best") != run.endswith("best"):  # other weights of the same run
        raise ValueError(f"{folder} has numbers of {run}, not of {label}: evaluate {label}")
    mine = [row for row in mine if row["run"] == run]
    return [*_qualities(mine, about["settings"]), *_speeds(mine, about["settings"])]


def _qualities(rows: list[dict[str, str]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = {row["metric"]: row for row in rows if row["part"] in _QUALITY}
    return [
        {
            "metric": ours,
            "value": round(float(found[name]["value"]), 4),
            "data": settings["data"],
            "split": settings.get("split") or "all",
            "held_out": None,
            "images": int(float(found["images"]["value"])),
            "seed": None,
            "commit": found[name]["commit"],
        }
        for name, ours in _NAMES.items()
        if name in found and "images" in found
    ]


def _speeds(rows: list[dict[str, str]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    batches: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["part"] in _SPEED and row["metric"] in _OF_SPEED:
            one = batches.setdefault(row["at"], {"metric": "speed", "batch": int(float(row["at"]))})
            one |= {row["metric"]: round(float(row["value"]), 4), "machine": row["machine"]}
            one |= {"commit": row["commit"], "precision": settings["precision"]}
    return list(batches.values())
