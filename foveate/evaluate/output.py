"""The files of an evaluation: eval.json, eval.csv, eval.md and its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.evaluate.figures import occlusion_figure, pruning_figure, tradeoff_figure
from foveate.evaluate.maps import maps_figure, usage_figure
from foveate.evaluate.report import Report
from foveate.evaluate.style import save
from foveate.evaluate.tables import markdown
from foveate.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures", "write"]

_KINDS = (".svg", ".png")


def write(report: Report, folder: Path) -> list[Path]:
    """Write everything into a folder, which is made if missing, and name what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"eval{kind}" for kind in (".json", ".csv", ".md")]
    report.save(written[0])
    write_text(written[1], report.csv())
    pictures = []
    for name, figure in figures(report):
        for kind in _KINDS:
            save(figure, folder / f"{name}{kind}")
            written.append(folder / f"{name}{kind}")
        pictures.append(f"{name}.svg")
    write_text(written[2], markdown(report, pictures))
    return written


def figures(report: Report) -> Iterator[tuple[str, Figure]]:
    """Every picture that the report has numbers for, with a name for its file."""
    entries = report.entries
    rows = [row for entry in entries for row in entry.rows.values()]
    if len(rows) > len(entries) and any(row.macs is not None for row in rows):
        yield "accuracy-macs", tradeoff_figure(entries)
    if any(entry.speeds for entry in entries):
        yield "accuracy-speed", tradeoff_figure(entries, speed=True)
    curves = {entry.label: entry.occlusion for entry in entries if entry.occlusion}
    if curves:
        yield "occlusion", occlusion_figure(curves)
    pruned = {entry.label: entry.pruning for entry in entries if entry.pruning}
    if pruned:
        yield "pruning", pruning_figure(pruned)
    seen: dict[str, int] = {}
    for entry in entries:
        for name, found in entry.statistics.items():
            words = f"{entry.label}, {name}" if len(entries) > 1 else name
            stem = re.sub(r"[^A-Za-z0-9.=+-]+", "_", words).strip("_")
            seen[stem] = seen.get(stem, 0) + 1  # two names may differ in what files may not have
            stem = stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"
            yield f"tokens-{stem}", usage_figure(found, words)
            yield f"map-{stem}", maps_figure(found, words)
