"""Run the demo: evaluate and time every cell, print a table, write a page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench import machine
from foveate.bench.timing import AGAIN, DENSE, measure
from foveate.core import ReducedViT
from foveate.data import CLASSES, fashion_mnist_mini
from foveate.data.demo import demo_vit
from foveate.demo.cells import CELLS, Row, build, evaluate, shipped_images
from foveate.demo.report import page, plots, table
from foveate.files import write_text

__all__ = ["run_demo"]

_SHOWN = ("evit(keep=0.5)", "tome(r=3)", "ats(K=28)", "dynamicvit(keep=0.5)")
_REMARKS = """\
+ trained with the method at keep 0.7, from the dense model, for one more epoch; * gates alone
trained, half an epoch or less, the model as it is; all others work on the model as it is, which was
fine-tuned on masked images. Compare with random: what a method is worth is what it keeps beyond.
Speed is the median of interleaved rounds with its 95 % interval; at batch 1 much of a tiny model's
time goes into starting operations, and what a method computes beside weighs more."""
_PICTURES = (0, 7, 8, 5)  # classes of which the first shipped test image is shown


def run_demo(
    out: Path, *, batches: tuple[int, ...] = (64, 1), rounds: int = 20, images: int | None = None
) -> list[Row]:
    """Evaluate the shipped model with every method; print and write what came of it.

    Args:
        out: folder for demo.html, its plots and picture, and demo.json; made if missing.
        batches: batch sizes to time.
        rounds: rounds of the interleaved timing.
        images: use only so many test images, for a quick look.
    """
    from rich.console import Console
    from rich.progress import Progress

    out.mkdir(parents=True, exist_ok=True)
    console, started = Console(), time.monotonic()
    vit = demo_vit()
    pictures, labels = shipped_images()
    pictures, labels = pictures[:images], labels[:images]
    console.print(
        f"A ViT of 12 blocks, 96 channels and 49 patches, trained on Fashion-MNIST, on "
        f"{len(labels)} test images with {torch.get_num_threads()} threads."
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("accuracy", total=len(CELLS))
        rows, models = [], {}
        for cell in CELLS:
            model = build(cell, vit)
            rows.append(evaluate(cell, model, pictures, labels))
            models[rows[-1].method] = model
            progress.advance(task)
        for batch in batches:
            task = progress.add_task(f"speed at batch {batch}", total=rounds + 2)
            x = pictures[:batch]
            _time(
                rows, models, x, rounds, lambda done, of, t=task: progress.update(t, completed=done)
            )
    console.print(table(rows, batches, tokens=console.width >= 90))
    console.print(_REMARKS, soft_wrap=True)
    facts = _facts(rounds, len(labels), time.monotonic() - started)
    shown = {name: model for name, model in models.items() if name in _SHOWN}
    drawn, sheet = plots(rows, batches), _sheet(shown)
    write_text(out / "demo.html", page(rows, batches, facts, drawn, sheet))
    record = {"facts": facts, "rows": [asdict(row) for row in rows]}
    write_text(out / "demo.json", json.dumps(record, indent=1) + "\n")
    for name, svg in drawn.items():
        write_text(out / f"{name}.svg", svg)
    sheet.save(out / "sheet.png", optimize=True)
    console.print(f"The page with plots and pictures: {out / 'demo.html'}", soft_wrap=True)
    return rows


@torch.inference_mode()
def _time(
    rows: list[Row],
    models: Mapping[str, nn.Module],
    x: Tensor,
    rounds: int,
    progress: Any,
) -> None:
    """Time all cells in one interleaved run and note the ratios in their rows."""
    calls = {name: (lambda m=model: m(x)) for name, model in models.items()}
    calls[AGAIN] = calls[DENSE]
    timings = measure(calls, rounds=rounds, warmup=2, sample_ms=20, device="cpu", progress=progress)
    for row in rows:
        ratio = timings.ratio(row.method, AGAIN if row.method == DENSE else DENSE)
        row.speed[len(x)] = {
            "ratio": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "per_second": 1000 * len(x) / timings.ms(row.method).median,
        }


def _facts(rounds: int, images: int, seconds: float) -> dict[str, Any]:
    here = machine.facts("cpu")
    return {
        "images": f"{images} test images of Fashion-MNIST that ship with foveate, 28 x 28",
        "speed": f"{rounds} interleaved rounds; the row of the dense model is its ratio to itself",
        **{name: here[name] for name in ("cpu", "threads", "system", "python", "torch", "timm")},
        "took": f"{seconds / 60:.1f} minutes",
    }


def _sheet(models: Mapping[str, nn.Module]) -> Any:
    """What some of the methods did to a few images."""
    from PIL import Image

    from foveate.viz import sheet

    images, labels = fashion_mnist_mini("test")
    first = {CLASSES[c]: images[(labels == c).nonzero()[0, 0], 0].numpy() for c in _PICTURES}
    reduced = {name: m for name, m in models.items() if isinstance(m, ReducedViT)}
    return sheet(reduced, {name: Image.fromarray(pixels) for name, pixels in first.items()})
