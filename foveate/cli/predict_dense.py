"""``foveate predict`` with a detector or a segmenter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_dense"]

_NAMED = 4  # kinds of objects on a line


def run_dense(args: argparse.Namespace, models: Sequence[Any]) -> int:
    """Predict, print and write; give 1 if some images could not be read."""
    from rich.console import Console
    from rich.progress import Progress

    from foveate.dense import Segmenter
    from foveate.predictions import predict_dense

    if len(models) > 1:
        raise ValueError(
            f"a detector or a segmenter takes one METHOD here, got {', '.join(args.methods)}"
        )
    (model,) = models
    maps = args.out if isinstance(model, Segmenter) else None
    out: Path | None = None if maps is not None else args.out
    if out is not None and out.suffix.lower() != ".json":
        raise ValueError(f"{out}: objects are written as .json")
    if maps is not None and maps.suffix:
        raise ValueError(f"{maps}: label maps are written into a folder")
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(args.model, total=None)
        found = predict_dense(
            model,
            args.images,
            pictures=args.pictures,
            maps=maps,
            least=args.least,
            batch=1 if args.batch is None else args.batch,
            precision=args.precision,
            strict=args.strict,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    Console(highlight=False).print(_table(found, isinstance(model, Segmenter), args.least))
    if out is not None:
        found.coco(out)
        print(f"wrote    {out} ({sum(len(one.objects) for one in found)} objects)")
    for folder, what in ((maps, "label maps"), (args.pictures, "pictures")):
        if folder is not None:
            print(f"wrote    {folder} ({len(found)} {what})")
    if not found.unreadable:
        return 0
    images = len(found) + len(found.unreadable)
    print(f"{len(found.unreadable)} of {images} images could not be read")
    return 1


def _table(found: Any, pixels: bool, least: float) -> Any:
    """Make a table with a line for each image."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    used = any(record.usage is not None for record in found)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("pixels of" if pixels else f"objects that score at least {100 * least:.0f} %")
    if used:
        table.add_column("patches used", justify="right", no_wrap=True)
    for record in found:
        pairs = list(zip(record.classes, record.scores, strict=True))
        pairs = pairs if pixels else [pair for pair in pairs if pair[1] >= least]
        words = [f"{found.class_names[label]} {100 * score:.0f} %" for label, score in pairs]
        more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
        cells = [record.image, (", ".join(words[:_NAMED]) or "none") + more]
        cells += [f"{100 * record.usage:.0f} %"] if used else []
        table.add_row(*map(Text, cells))
    return table
