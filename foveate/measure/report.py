"""The files of a report: the table as CSV and JSON, a page in Markdown, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.files import write_text
from foveate.measure.figures import figures
from foveate.measure.maps import maps_figure, usage_figure
from foveate.measure.run import Evaluation
from foveate.measure.sheets import Sheet, markdown
from foveate.measure.style import save, stems
from foveate.measure.table import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write"]


def write(
    results: Results,
    folder: Path,
    name: str = "eval",
    *,
    title: str = "Evaluation",
    kinds: tuple[str, ...] = (".svg", ".png"),
    first: Sequence[Sheet] = (),
) -> list[Path]:
    """Write everything into a folder, which is made if missing, and return the paths.

    Args:
        results: results to write.
        folder: folder for the files.
        name: name of the table and the page, without suffix.
        title: title of the page.
        kinds: kinds of picture files; the page shows the first kind.
        first: sheets to show before those of the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = results.save(folder / f"{name}.json")
    pictures = []
    for stem, figure in (*figures(results), *_maps(results)):
        written += save(figure, *(folder / f"{stem}{kind}" for kind in kinds))
        pictures.append(f"{stem}{kinds[0]}")
    write_text(folder / f"{name}.md", markdown(results, pictures, title, first))
    return [*written, folder / f"{name}.md"]


def _maps(results: Results) -> Iterator[tuple[str, Figure]]:
    """Draw the statistics of tokens, which are not all in the table."""
    if not isinstance(results, Evaluation):
        return
    several = len(results.about["models"]) > 1
    words = [f"{run}, {method}" if several else method for run, method in results.tokens]
    for stem, title, found in zip(stems(words), words, results.tokens.values(), strict=True):
        yield f"tokens-{stem}", usage_figure(found, title)
        yield f"map-{stem}", maps_figure(found, title)
