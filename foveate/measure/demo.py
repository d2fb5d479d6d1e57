"""The demo: a comparison of every method on the small trained models that ship, with a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foveate import config
from foveate.core import ReducedViT
from foveate.data import CLASSES, fashion_mnist_mini
from foveate.files import write_text, write_whole
from foveate.measure.cell import judge
from foveate.measure.cells import make_cells
from foveate.measure.comparison import Comparison
from foveate.measure.gather import collect
from foveate.measure.page import page
from foveate.measure.report import write
from foveate.measure.run import Progress
from foveate.measure.shipped import open_any
from foveate.measure.state import states_of
from foveate.measure.table import Results
from foveate.measure.variants import variants

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["run_demo"]

# Whose pictures the page shows, by the model that it runs on.
_SHOWN: dict[str, tuple[str, ...]] = {
    "demo": ("evit(keep=0.5)", "tome(r=3)", "ats(K=28)"),
    "demo_dynamicvit": ("dynamicvit(keep=0.5)",),
}
_PICTURES = (0, 7, 8, 5)  # classes of which the first shipped test image is shown


def run_demo(
    out: Path,
    settings: tuple[str, ...] = (),
    *,
    command: str = "foveate demo",
    progress: Progress | None = None,
) -> tuple[Results, list[Path]]:
    """Evaluate the shipped models with every method; return what was found and written.

    The comparison is recipes/compare/demo.yaml, whose one cell runs in this process.

    Args:
        out: folder for demo.html, the table, plots and pictures; made if missing.
        settings: changes of the comparison, such as "evaluate.rounds=3".
        command: what was typed, for the record.
        progress: told how far everything is.
    """
    comparison = config.read(Comparison, config.find_recipe("compare", "demo"), settings)
    cells = make_cells(comparison, out)
    (cell,) = cells.values()
    judge(cell.work, cell.folder, command, progress)
    results = collect(comparison, cells, states_of(cells), command)
    written = write(results, out, "demo", title="The demo", kinds=(".svg",))
    picture = _sheet()
    write_whole(out / "sheet.png", lambda path: picture.save(path, "PNG", optimize=True))
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in out.glob("accuracy-*.svg")}
    write_text(out / "demo.html", page(results, drawn, picture))
    return results, [*written, out / "sheet.png", out / "demo.html"]


def _sheet() -> Image:
    """Draw what some of the methods do to a few images."""
    from PIL import Image

    from foveate.viz import sheet

    images, labels = fashion_mnist_mini("test")
    first = {CLASSES[c]: images[(labels == c).nonzero()[0, 0], 0].numpy() for c in _PICTURES}
    reduced: dict[str, ReducedViT] = {}
    for model, methods in _SHOWN.items():
        found = variants(open_any(model), methods)
        reduced |= {n: m for n in methods if isinstance(m := found[n], ReducedViT)}
    return sheet(reduced, {name: Image.fromarray(pixels) for name, pixels in first.items()})
