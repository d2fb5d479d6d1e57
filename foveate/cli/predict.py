"""Predict labels, objects or pixel classes, and draw which patches were used.

Images are prepared as in foveate eval. A METHOD is applied to a plain model without training.
Labels are numbers if the model does not carry the names of its classes. The exit code is 1 if some
images could not be read.

In a terminal:
  foveate predict demo --images photos/
  foveate predict demo "evit(keep=0.7)" "tome(r=3)" --images photos/ --pictures pictures/
  foveate predict runs/finetune-photos --images cat.jpg dog.jpg --top 3 --out answers.csv
  foveate predict deit_small_patch16_224 evit --images photos/ --out answers.json --device cuda
  foveate predict runs/detect-scenes --images photos/ --out coco.json --pictures pictures/
  foveate predict runs/segment-scenes --images photos/ --out maps/
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.models import add_model, add_untrained

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from foveate.predictions import Prediction, Predictions

__all__ = ["add_arguments", "run"]

_WIDE = 140  # columns of a table that goes to a file or a pipe
_LEAST, _GAP = 20, 3  # columns for further answers: the least that says something; before them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--images",
        nargs="+",
        required=True,
        metavar="PATH",
        help="image files, and folders of them",
    )
    add(
        "--top",
        type=int,
        default=3,
        metavar="K",
        help="number of answers for each image (default: 3)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="file for all answers: .csv or .json for a classifier, .json in COCO's format for a "
        "detector; for a segmenter a folder, which gets label maps",
    )
    add("--pictures", type=Path, metavar="DIR", help="folder for one picture of each image")
    add(
        "--batch",
        type=int,
        metavar="N",
        help="number of images in one pass (default: 32; 1 for detectors and segmenters)",
    )
    add(
        "--least",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score of the objects that are listed and drawn (default: 0.5)",
    )
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default)")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="fp32 (default), or bf16 for automatic mixed precision",
    )
    add("--strict", action="store_true", help="stop at the first image that cannot be read")
    add_untrained(parser)


def run(args: argparse.Namespace) -> int:
    """Predict, print and write; give 1 if some images could not be read."""
    from foveate.files import made_folder

    with made_folder(args.out and args.out.parent), made_folder(args.pictures):
        return _predict(args)


def _predict(args: argparse.Namespace) -> int:
    from foveate import machine
    from foveate.cli.models import open_models
    from foveate.dense import DenseModel

    device = machine.device_of(args.device)
    models = open_models(args.model, args.methods, untrained=args.untrained)
    for model in models:
        model.to(device)
    if isinstance(models[0], DenseModel):
        from foveate.cli.predict_dense import run_dense

        return run_dense(args, models)
    if args.out is not None and args.out.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"{args.out}: answers are written as .csv or .json")
    found = _predictions(args, models)
    console = _console()
    console.print(_table(found, models, console))
    if args.out is not None:
        (found.csv if args.out.suffix.lower() == ".csv" else found.json)(args.out)
        print(f"wrote    {args.out} ({len(found.rows())} answers)")
    if args.pictures is not None:
        count = _draw(args.pictures, models, found)
        print(f"wrote    {args.pictures} ({count} pictures)")
    if not found.unreadable:
        return 0
    images = len({record.image for record in found}) + len(found.unreadable)
    print(f"{len(found.unreadable)} of {images} images could not be read")
    return 1


def _predictions(args: argparse.Namespace, models: Sequence[nn.Module]) -> Predictions:
    """Predict with each model in turn, and put the answers for each image together."""
    from rich.console import Console
    from rich.progress import Progress

    from foveate.predictions import Predictions, predict

    found: list[Predictions] = []
    images: Any = args.images
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        for model in models:
            task = bar.add_task(repr(getattr(model, "reducer", args.model)), total=None)

            def told(done: int, total: int, task: Any = task) -> None:
                bar.update(task, completed=done, total=total)

            found.append(
                predict(
                    model,
                    images,
                    top=args.top,
                    batch=32 if args.batch is None else args.batch,
                    precision=args.precision,
                    strict=args.strict,
                    progress=told,
                )
            )
            images = [record.image for record in found[0]]  # files are named as unreadable once
    records = tuple(record for group in zip(*found, strict=True) for record in group)
    return Predictions(args.model, records, found[0].unreadable)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    known = console.is_terminal or "COLUMNS" in os.environ
    return console if known else Console(highlight=False, width=_WIDE)


def _table(
    found: Predictions, models: Sequence[Any], console: Console, room: int | None = None
) -> Table:
    """Make a table with a line for each image and method.

    ``room`` is the width for further answers, 0 for none; None measures what the others leave.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if room is None:
        unlimited = console.options.update(width=10_000)
        others = console.measure(_table(found, models, console, 0), options=unlimited).maximum
        room = console.width - others - _GAP if len(found[0].labels) > 1 else 0
        room = room if room >= _LEAST else 0
    shared, reduced = _shared_folder(found), any(record.method for record in found)
    several = len(models) > 1
    title = f"images in {shared}" if shared else None
    table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
    table.add_column("image", overflow="fold")
    if several:
        table.add_column("method", overflow="fold")
    table.add_column("label", overflow="fold")
    table.add_column("confidence", justify="right", no_wrap=True)
    if reduced:
        spec = models[0].backbone.spec
        dense = spec.prefix + spec.grid[0] * spec.grid[1]
        table.add_column(f"tokens of {dense}", justify="right", no_wrap=True)
    if room:
        table.add_column("further answers", no_wrap=True, style="dim")
    for number, record in enumerate(found):
        name = os.path.relpath(record.image, shared) if shared else record.image
        cells = ["" if number % len(models) else name]
        cells += [str(record.method)] if several else []
        cells += [record.label, f"{record.confidence:.1%}"]
        cells += [str(record.tokens)] if reduced else []
        cells += [_further(record, room)] if room else []
        table.add_row(*map(Text, cells))  # as text: brackets in a name are not a style
    return table


def _further(record: Prediction, room: int) -> str:
    """List the answers after the best one that fit into the width."""
    words = ""
    for label, confidence in zip(record.labels[1:], record.confidences[1:], strict=True):
        longer = f"{words}{', ' if words else ''}{label} {confidence:.1%}"
        if len(longer) > room:
            break
        words = longer
    return words


def _shared_folder(found: Predictions) -> str:
    """Return the folder that all files share, to leave it out of every line."""
    names = [record.image for record in found]
    if len({*names}) < 2 or len({os.path.isabs(name) for name in names}) > 1:
        return ""
    return os.path.commonpath([os.path.dirname(name) for name in names])


def _draw(folder: Path, models: Sequence[nn.Module], found: Predictions) -> int:
    """Write one picture for each image, with a strip for each model."""
    from foveate.data import read_image
    from foveate.files import FreeNames
    from foveate.predictions import picture
    from foveate.viz import stacked

    names = FreeNames()
    for first in range(0, len(found), len(models)):
        records = found[first : first + len(models)]
        path = Path(records[0].image)
        image = read_image(path)
        strips = [
            picture(model, image, record) for model, record in zip(models, records, strict=True)
        ]
        _write(stacked(strips), folder / f"{names.free(path.stem)}.png")
    return len(names)


def _write(sheet: Image, path: Path) -> None:
    from foveate.files import write_whole

    write_whole(path, lambda partial: sheet.save(partial, format="png"))
