"""What an evaluation found, and its files: JSON with everything, CSV with every number measured."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from foveate.evaluate.occlusion import Occlusion
from foveate.evaluate.pruning import Pruned
from foveate.evaluate.rates import Row
from foveate.evaluate.speed import Speed
from foveate.evaluate.statistics import TokenStatistics
from foveate.files import read_json, write_text

__all__ = ["Entry", "Report"]

FORMAT = 1
_COLUMNS = (
    *("part", "model", "method", "rate", "ratio", "seed", "images", "top1", "top5"),
    *("macs", "dense_macs", "tokens_last_block", "untrained_method"),
    *("times_dense_speed", "times_low", "times_high", "images_per_second"),
)


@dataclass
class Entry:
    """Everything about one model.

    Attributes:
        label: what it is called in tables and pictures.
        about: family, parameters, how its images are prepared, how many there were.
        rows: the dense model and every method, by name.
        speeds: of the same, where they were timed.
        occlusion: of the model as it was given.
        pruning: without training.
        statistics: of tokens, by the name of the row.
    """

    label: str
    about: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)
    occlusion: Occlusion | None = None
    pruning: list[Pruned] = field(default_factory=list)
    statistics: dict[str, TokenStatistics] = field(default_factory=dict)


@dataclass
class Report:
    """An evaluation: its circumstances and its models.

    Attributes:
        command: what was typed, if anything.
        commit: which code was run.
        machine: versions and names.
        settings: data, seeds, precision and everything else that the numbers depend on.
        entries: one a model.
    """

    command: str | None
    commit: str | None
    machine: dict[str, Any]
    settings: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)

    def entry(self, label: str) -> Entry:
        """The model of that label."""
        for entry in self.entries:
            if entry.label == label:
                return entry
        there = ", ".join(entry.label for entry in self.entries)
        raise ValueError(f"no model is called {label!r} here; there are {there}")

    # JSON --------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write JSON with everything."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _dumped({"format": FORMAT, **dataclasses.asdict(self)}) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what ``save`` wrote."""
        found = read_json(path, f"{path} does not exist; expected what foveate eval wrote")
        try:
            if found.pop("format") > FORMAT:
                raise ValueError(f"{path} is of a newer version of foveate")
            report: Report = _read(cls, found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what foveate eval writes: see {error}") from error
        return report

    # CSV ---------------------------------------------------------------------------------------

    def csv(self) -> str:
        """One line for each number that was measured; seeds on lines of their own."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for entry in self.entries:
            for line in _lines(entry):
                writer.writerow({"model": entry.label, **line})
        return text.getvalue()


def _lines(entry: Entry) -> Iterator[dict[str, Any]]:
    for name, row in entry.rows.items():
        line = {
            "part": "accuracy",
            "method": name,
            "rate": row.rate,
            "images": row.accuracy.images,
            "top1": row.accuracy.top1,
            "top5": row.accuracy.top5,
            "macs": row.macs,
            "dense_macs": row.dense_macs,
            "tokens_last_block": row.tokens,
            "untrained_method": int(row.untrained),
        }
        if name in entry.speeds:
            speed = entry.speeds[name]
            line |= {
                "times_dense_speed": speed.ratio,
                "times_low": speed.low,
                "times_high": speed.high,
                "images_per_second": speed.per_second,
            }
        yield line
    curve = entry.occlusion
    if curve is not None:
        for ratio, found in zip(curve.ratios, curve.top1, strict=True):
            for seed, value in zip(curve.seeds, found.values, strict=True):
                yield {
                    "part": "occlusion",
                    "ratio": ratio,
                    "seed": seed,
                    "images": curve.images,
                    "top1": value,
                }
    for pruned in entry.pruning:
        seeds: tuple[int | None, ...] = pruned.seeds or (None,)
        for number, value in zip(seeds, pruned.top1.values, strict=True):
            yield {
                "part": "pruning",
                "method": pruned.method,
                "rate": pruned.rate,
                "seed": number,
                "images": pruned.images,
                "top1": value,
                "macs": pruned.macs,
            }


# From JSON ---------------------------------------------------------------------------------------


def _read(hint: Any, value: Any) -> Any:
    """Plain data as what a type hint says: dataclasses, tuples, lists and dictionaries of them."""
    kind, parts = get_origin(hint), get_args(hint)
    if value is None:
        return None
    if kind in (Union, types.UnionType):  # of ours at most one part has another kind than numbers
        wanted = tuple if isinstance(value, list) else type(value)
        fitting = [part for part in parts if _kind(part) is wanted]
        return _read(fitting[0], value) if fitting else value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: _read(hints[name], one) for name, one in value.items()})
    if kind in (tuple, list):
        return kind(_read(parts[0], one) for one in value)
    if kind is dict:
        return {name: _read(parts[1], one) for name, one in value.items()}
    return value


def _kind(hint: Any) -> Any:
    """What a part of a union looks like in JSON."""
    return dict if dataclasses.is_dataclass(hint) else get_origin(hint)


def _dumped(content: Any, indent: int = 0) -> str:
    """JSON with one line for each list or small dictionary of plain values."""
    flat = json.dumps(content)
    deep = isinstance(content, (dict, list)) and any(
        isinstance(v, (dict, list))
        for v in (content.values() if isinstance(content, dict) else content)
    )
    if not deep and (len(flat) <= 100 or isinstance(content, list)):
        return flat
    pad = " " * (indent + 1)
    if isinstance(content, dict):
        lines = [f"{pad}{json.dumps(k)}: {_dumped(v, indent + 1)}" for k, v in content.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    lines = [pad + _dumped(v, indent + 1) for v in content]
    return "[\n" + ",\n".join(lines) + "\n" + " " * indent + "]"
