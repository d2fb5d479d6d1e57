"""The demo: every method on the small trained models that ship, a detector too, with a page."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate import config
from foveate.convert import open_shipped
from foveate.core import ReducedViT
from foveate.data import CLASSES, fashion_mnist_mini, open_source
from foveate.data.images import as_picture
from foveate.files import write_text, write_whole
from foveate.measure.cell import judge
from foveate.measure.cells import make_cells
from foveate.measure.comparison import Asked, Comparison
from foveate.measure.dense import evaluate_dense
from foveate.measure.gather import collect
from foveate.measure.page import page
from foveate.measure.report import write
from foveate.measure.run import Plan, Progress
from foveate.measure.state import states_of
from foveate.measure.table import Results, pd
from foveate.measure.variants import variants
from foveate.predictions import predict_dense

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["run_demo"]

_log = logging.getLogger(__name__)

# The methods whose pictures the page shows, by model.
_SHOWN: dict[str, tuple[str, ...]] = {
    "demo": ("evit(keep=0.5)", "tome(r=3)", "ats(K=28)"),
    "demo_dynamicvit": ("dynamicvit(keep=0.5)",),
}
_PICTURES = (0, 7, 8, 5)  # classes of which the first shipped test image is shown
_SCENES = "scenes:size=64,test=500,clutter=0.3"  # what the detector was trained for
_SCENES_SEEN, _SCENES_SHOWN = 100, (1, 4, 5, 7)


def run_demo(
    out: Path,
    settings: tuple[str, ...] = (),
    *,
    command: str = "foveate demo",
    progress: Progress | None = None,
) -> tuple[Results, list[Path]]:
    """Evaluate the shipped models with every method; return what was found and written.

    The comparison is recipes/compare/demo.yaml, whose one cell runs in this process. After it a
    detector looks at scenes, with all patches and with SViT.

    Args:
        out: folder for demo.html, the table, plots and pictures; made if missing.
        settings: changes of the comparison, such as "evaluate.rounds=3".
        command: what was typed, for the record.
        progress: called with the progress of everything.
    """
    comparison = config.read(Comparison, config.find_recipe("compare", "demo"), settings)
    cells = make_cells(comparison, out)
    (cell,) = cells.values()
    judge(cell.work, cell.folder, command, progress)
    results = collect(comparison, cells, states_of(cells), command)
    detected: tuple[Results, list[Path]] | None = None
    if find_spec("pycocotools") is None:
        _log.warning("the detector is left out: what measures it comes with 'foveate[dense]'")
    else:
        detected = _detect(out / "scenes", comparison.evaluate, progress)
        results.table = pd.concat([results.table, detected[0].table], ignore_index=True)
        results.about["scenes"] = detected[0].about
    written = write(results, out, "demo", title="The demo", kinds=(".svg",))
    picture = _sheet()
    write_whole(out / "sheet.png", lambda path: picture.save(path, "PNG", optimize=True))
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in out.glob("accuracy-*.svg")}
    write_text(out / "demo.html", page(results, drawn, out / "sheet.png", detected))
    return results, [*written, out / "sheet.png", out / "demo.html"]


def _detect(folder: Path, how: Asked, progress: Progress | None) -> tuple[Results, list[Path]]:
    """Evaluate the detector on scenes, and draw what it finds in a few of them."""
    model: Any = open_shipped("demo_detector")
    limit = _SCENES_SEEN if how.limit is None else min(_SCENES_SEEN, max(4, how.limit // 5))
    plan = Plan(
        data=_SCENES,
        split="test",
        limit=limit,
        batch=20,
        speed=(1,),
        rounds=how.rounds,
        device=how.device,
    )
    found = evaluate_dense({"demo_detector": model}, plan, progress=progress)
    scenes = open_source(_SCENES, "test")
    shown = [as_picture(scenes.image(number)) for number in _SCENES_SHOWN]
    predict_dense(model, shown, pictures=folder, device=how.device)
    return found, sorted(folder.glob("*.png"))


def _sheet() -> Image:
    """Draw what some of the methods do to a few images."""
    from PIL import Image

    from foveate.viz import sheet

    images, labels = fashion_mnist_mini("test")
    first = {CLASSES[c]: images[(labels == c).nonzero()[0, 0], 0].numpy() for c in _PICTURES}
    reduced: dict[str, ReducedViT] = {}
    for model, methods in _SHOWN.items():
        found = variants(open_shipped(model), methods)
        reduced |= {n: m for n in methods if isinstance(m := found[n], ReducedViT)}
    return sheet(reduced, {name: Image.fromarray(pixels) for name, pixels in first.items()})
