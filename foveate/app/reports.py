"""Read from the folder of a run, comparison, pipeline or evaluation what the page shows."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate import machine
from foveate.app.places import RECIPE, tables_of
from foveate.files import read_json
from foveate.measure import Results
from foveate.measure.figures import figures
from foveate.measure.sheets import Sheet, sheets
from foveate.train.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "data_url", "report"]

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
_MOST, _MEGABYTES = 24, 4.0  # how many pictures are shown, and how large each may be
_MOST_ROWS = 200_000  # rows of a table; the largest comparisons have about ten thousand
# Keys of result.json that ``_facts`` handles one by one, or that no reader of the page needs.
_OTHER = ("job", "images", "splits", "machine", "commit", "score")


@dataclass
class Report:
    """The content of a folder, ready to be shown.

    Attributes:
        title: the last two parts of the folder's path.
        facts: facts about the run or the measurements, by name.
        pages: reports as the commands wrote them, in Markdown without pictures.
        sheets: tables of measurements that have no such report.
        pictures: plots and picture files by name, each as a "data:..." address that holds it.
        recipe: settings as YAML; "" if there are none.
        notes: what is missing or was left out, in sentences.
    """

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    pages: list[str] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    notes: list[str] = field(default_factory=list)


def report(folder: Path) -> Report:
    """Read a folder; ValueError if it holds neither a run nor a table."""
    found, tables = Report(str(Path(*folder.parts[-2:]))), tables_of(folder)
    run = (folder / RECIPE).is_file()
    if not run and not tables:
        raise ValueError(
            f"{folder} holds neither a run ({RECIPE}) nor a table of measurements: foveate eval "
            "--out, compare --report and pipeline write one"
        )
    if run:
        _add_run(found, folder)
    _add_pictures(found, folder)
    for path in tables:
        _add_table(found, path)
    return found


def _add_run(found: Report, folder: Path) -> None:
    found.recipe = (folder / RECIPE).read_text(encoding="utf-8", errors="replace")
    content: dict[str, Any] = {}
    if (folder / "result.json").is_file():
        content = _result(found, folder / "result.json")
    else:
        found.notes.append("This run has not finished: it has no result.json.")
    if not (folder / "metrics.csv").is_file():
        found.notes.append("This run has logged nothing yet.")
        return
    result = Result(folder, content)
    try:
        found.pictures["losses and scores"] = _drawn(result.plot())
    except (KeyError, TypeError, ValueError) as error:
        found.notes.append(f"metrics.csv cannot be drawn: {error}")


def _result(found: Report, path: Path) -> dict[str, Any]:
    """Read result.json and add its facts; a file that does not hold any gets a note instead."""
    try:
        content = read_json(path, f"{path} does not exist")
        if not isinstance(content, dict):
            raise ValueError(f"{path.name} holds no object with results: the file is damaged")
    except ValueError as error:
        found.notes.append(f"{error}.")
        return {}
    found.facts |= _facts(content)
    return content


def _facts(content: dict[str, Any]) -> dict[str, str]:
    """Put the content of result.json into words."""
    facts = {"job": str(content.get("job", "unknown"))}
    for name, value in content.items():
        if name not in _OTHER and isinstance(value, (int, float)):
            facts[name.replace("_", " ")] = f"{value:g}"
    images = content.get("images")
    if isinstance(images, dict):
        facts["images"] = ", ".join(f"{count} {name}" for name, count in images.items() if count)
    if isinstance(content.get("machine"), dict) and "cpu" in content["machine"]:
        facts["machine"] = machine.name(content["machine"])
    if content.get("commit"):
        facts["commit"] = str(content["commit"])
    return facts


def _add_table(found: Report, path: Path) -> None:
    page = path.with_suffix(".md")
    if page.is_file():
        text = page.read_text(encoding="utf-8", errors="replace")
        text, _, settings = text.partition("\n## Settings\n")
        found.pages.append(re.sub(r"^!\[.*\n", "", text, flags=re.M))
        found.recipe = found.recipe or settings.replace("```yaml", "").replace("```", "").strip()
        return
    try:
        results = Results.load(path)
        if len(results.table) > _MOST_ROWS:
            raise ValueError(f"{path.name} has more than {_MOST_ROWS} rows")
        found.sheets += sheets(results)
    except ValueError as error:
        found.notes.append(f"{error}.")
        return
    for name, figure in figures(results):
        if name not in found.pictures:
            found.pictures[name] = _drawn(figure)
    about = results.about
    if about.get("command"):
        found.facts["command"] = str(about["command"])
    for column in ("machine", "commit"):
        known = [str(one) for one in results.table[column].unique() if one]
        found.facts[column] = ", ".join(known) or "unknown"
    found.recipe = found.recipe or str(about.get("recipe", ""))


def _add_pictures(found: Report, folder: Path) -> None:
    """Add the pictures in the folder and in the folders directly in it."""
    left = 0
    for path in _picture_files(folder):
        if len(found.pictures) >= _MOST or path.stat().st_size > _MEGABYTES * 1e6:
            left += 1
            continue
        name = str(path.relative_to(folder).with_suffix(""))
        found.pictures[name] = data_url(path.read_bytes(), _KINDS[path.suffix.lower()])
    if left:
        found.notes.append(
            f"{left} more pictures are in the folder: at most {_MOST} are shown, of up to "
            f"{_MEGABYTES:g} MB each."
        )


def _picture_files(folder: Path) -> Iterator[Path]:
    names = set()
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix.lower() in _KINDS and path.is_file() and not path.name.startswith("."):
            if path.with_suffix("") not in names:  # the same plot as .png and as .svg
                names.add(path.with_suffix(""))
                yield path


def _drawn(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return data_url(file.getvalue(), "image/svg+xml")


def data_url(content: bytes, kind: str) -> str:
    """Return an address that holds the whole content of a picture."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
