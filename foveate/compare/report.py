"""The files of a comparison: report.md, report.json, report.csv and pictures beside them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate import config
from foveate.bench import machine
from foveate.compare.cells import Cell
from foveate.compare.figures import figures
from foveate.compare.gather import collect
from foveate.compare.numbers import Number
from foveate.compare.results import Results
from foveate.compare.settings import Comparison
from foveate.compare.state import State
from foveate.compare.tables import absent, sheets
from foveate.evaluate.style import save
from foveate.evaluate.tables import Sheet, markdown_table
from foveate.files import write_text

__all__ = ["draw"]

_COLUMNS = (
    *("part", "model", "method", "rate", "trained", "ratio", "seed", "mask_seed", "images"),
    *("top1", "top5", "drop", "macs", "dense_macs", "tokens_last_block", "times_dense_speed"),
)


def draw(
    comparison: Comparison,
    cells: Mapping[str, Cell],
    states: Mapping[str, State],
    out: Path,
    *,
    title: str,
    command: str,
) -> tuple[list[Sheet], list[Path]]:
    """Write the report of what is there; gives its tables, and what was written."""
    results = collect(comparison, cells, states)
    tables = list(sheets(results))
    missing = absent(states)
    tables += [] if missing is None else [missing]
    out.mkdir(parents=True, exist_ok=True)
    pictures, written = [], []
    for name, figure in figures(results):
        path = out / f"{name}.svg"
        save(figure, path)
        written.append(path)
        pictures.append(path.name)
    about = {
        "command": command,
        "commit": machine.commit(),
        "machines": results.machines,
        "commits": results.commits,
        "seeds": list(comparison.seeds),
    }
    texts = {
        "report.md": _markdown(title, about, comparison, tables, pictures),
        "report.json": json.dumps(_json(about, comparison, results, states), indent=1) + "\n",
        "report.csv": _csv(results.raw),
    }
    for name, text in texts.items():
        write_text(out / name, text)
        written.append(out / name)
    return tables, written


def _markdown(
    title: str,
    about: Mapping[str, Any],
    comparison: Comparison,
    tables: Sequence[Sheet],
    pictures: Sequence[str],
) -> str:
    lines = [f"# Comparison: {title}", "", f"    {about['command']}", ""]
    lines += [f"- seeds of training: {' '.join(map(str, comparison.seeds))}"]
    lines += [f"- machine: {name} ({n} cells)" for name, n in about["machines"].items()]
    lines += [f"- commit of cells: {name} ({n} cells)" for name, n in about["commits"].items()]
    lines += [f"- commit of this report: {about['commit'] or 'unknown'}", ""]
    for sheet in tables:
        lines += [f"## {sheet.title}", "", *markdown_table(sheet), ""]
        lines += [line for note in sheet.notes for line in (note, "")]
    lines += [line for name in pictures for line in (f"![{Path(name).stem}]({name})", "")]
    lines += ["## Settings", "", "```yaml", config.dump(comparison).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _json(
    about: Mapping[str, Any],
    comparison: Comparison,
    results: Results,
    states: Mapping[str, State],
) -> dict[str, Any]:
    return {
        "format": 1,
        **about,
        "settings": _plain(comparison),
        "cells": {name: _plain(state) for name, state in states.items()},
        "lines": _plain(results.lines),
        "occlusion": _plain(results.curves),
        "pruning": _plain(results.pruning),
        "mask_seeds": results.mask_seeds,
    }


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries; numbers with their mean, spread and seeds."""
    if isinstance(value, Number):
        return value.json()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
