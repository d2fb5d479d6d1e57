"""Measure training: the speed of single steps, and of whole runs that read their images.

    python benchmarks/train_speed.py steps --device cuda --out steps.json
    python benchmarks/train_speed.py run --updates 500 --out run.json

"steps" times the forward pass, losses, backward pass and update of one batch that is on the device
already. All variants of a batch size run interleaved in random order; ratios are medians of rounds,
over the dense model in the same precision. Memory is the peak of a step as CUDA counts it,
beyond what was there before: weights, and the moments of the optimiser.

"run" trains by a recipe of ImageNet on JPEG images of 500 x 375 pixels that it makes, in shards.
They are gratings of random colours and phases under noise; the class is their direction and width,
so the accuracy shows that the run learns. It reports what result.json says: images per second, and
the share of time in which the training process waited for images.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import foveate
from foveate import config, machine
from foveate.bench.memory import peak_memory
from foveate.timing import measure
from foveate.train import recipe as recipes
from foveate.train.build import make_finetune, make_reduce
from foveate.train.draws import Draws
from foveate.train.optim import make_optimiser
from foveate.train.task import total

CLASSES = 20
PRECISIONS = ("fp32", "bf16", "bf16 compiled")
# By name: the job, and the settings that are changed in it.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("finetune", {}),
    "masked 0.5": ("finetune", {"masking": {"ratios": [0.5]}}),
    "masked 0.75": ("finetune", {"masking": {"ratios": [0.75]}}),
    "evit 0.7": ("reduce", {"method": "evit(keep=0.7)"}),
    "evit 0.5": ("reduce", {"method": "evit(keep=0.5)"}),
    "tome 13": ("reduce", {"method": "tome(r=13)"}),
    "dynamicvit 0.7": ("reduce", {"method": "dynamicvit(keep=0.7)"}),
}
COMPILED = ("dense", "evit 0.7", "dynamicvit 0.7")


# Steps ----------------------------------------------------------------------------------------


def make_step(
    job: str, precision: str, options: argparse.Namespace, batch: int
) -> Callable[[], Tensor]:
    """Return a call that runs one update on fixed images."""
    kind, changes = JOBS[job]
    torch.manual_seed(0)
    model = {"name": options.model, "drop_path": 0.1}
    if kind == "finetune":
        task: Any = make_finetune(config.parse(recipes.Finetune, {"model": model, **changes}), 1000)
    else:
        weights = {"kl": 0.0, "token": 0.0} if "dynamicvit" in job else {}
        tree = {"model": model, "weights": weights, **changes}
        task = make_reduce(config.parse(recipes.Reduce, tree), 1000)
    task = task.to(options.device).train()
    if precision.endswith("compiled"):
        task.compile()
    optimiser = make_optimiser(task, recipes.Optim(), 1e-5)
    side = task.backbone.patch_embed.img_size
    images = torch.randint(0, 256, (batch, 3, *side), dtype=torch.uint8, device=options.device)
    labels = torch.randint(0, 1000, (batch,), device=options.device)
    half = precision.startswith("bf16")

    def step() -> Tensor:
        draws = Draws(0, 0, 0, device=options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=half):
            losses = task.training_step({"image": images, "label": labels}, draws)
            loss = total(losses, task.weights)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants at each batch size."""
    cells = []
    for batch in options.batches:
        variants = {
            (job, precision): make_step(job, precision, options, batch)
            for precision in options.precisions
            for job in options.jobs
            if not precision.endswith("compiled") or job in COMPILED
        }
        for step in variants.values():  # compile, and fill caches
            for _ in range(3):
                step()
        timings = measure(
            {f"{job}, {precision}": step for (job, precision), step in variants.items()},
            rounds=options.rounds,
            warmup=2,
            sample_ms=1,
            device=options.device,
        )
        cell: dict[str, Any] = {"batch": batch, "images_per_second": {}, "ratio": {}, "memory": {}}
        print(f"\nbatch {batch}: images a second, speed over dense, peak MiB")
        for (job, precision), step in variants.items():
            name, base = f"{job}, {precision}", f"dense, {precision}"
            rate = batch / timings.ms(name).median * 1e3
            ratio = timings.ratio(name, base)
            cell["images_per_second"][name] = round(rate, 1)
            cell["ratio"][name] = ratio.rounded()
            line = f"  {name:30} {rate:8.0f}   {ratio}"
            if options.device == "cuda":
                cell["memory"][name] = round(peak_memory(step, "cuda") / 2**20)
                line += f"   {cell['memory'][name]}"
            print(line, flush=True)
        cells.append(cell)
    return {"what": "steps", "model": options.model, "rounds": options.rounds, "cells": cells}


# Runs -----------------------------------------------------------------------------------------


def picture(seed: int) -> tuple[bytes, int]:
    """Return a JPEG of 500 x 375 pixels, and its class."""
    draw = np.random.default_rng(seed)
    label = int(draw.integers(CLASSES))
    angle = math.pi * (label % 10) / 10 + draw.normal(0, 0.03)
    wave = (18 if label < 10 else 36) * draw.uniform(0.9, 1.1)
    y, x = np.mgrid[:375, :500]
    phase = 2 * math.pi * ((x * math.cos(angle) + y * math.sin(angle)) / wave + draw.random())
    strength = (np.sin(phase) + 1)[..., None] / 2
    colours = draw.uniform(0, 255, (2, 3))
    pixels = strength * colours[0] + (1 - strength) * colours[1] + draw.normal(0, 20, (375, 500, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue(), label


def shard(path: Path, first: int, count: int) -> int:
    """Write images into a tar file, and return their size in bytes."""
    size = 0
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            content, label = picture(number)
            size += len(content)
            for ending, data in (("jpg", content), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:08d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return size


def make_shards(folder: Path, images: int, workers: int) -> float:
    """Write shards of up to 500 images, 1000 for validation; return the mean KB of an image."""
    parts = [("train", first, min(500, images - first)) for first in range(0, images, 500)]
    parts += [("val", images + first, 500) for first in (0, 500)]
    (folder / "classes.txt").write_text("\n".join(f"grating {i}" for i in range(CLASSES)) + "\n")
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(shard, folder / f"{split}-{first:06d}.tar", first, count)
            for split, first, count in parts
        ]
        return sum(job.result() for job in jobs) / (images + 1000) / 1000


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train with a data loader."""
    cells = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kilobytes = make_shards(folder, options.images, options.workers)
        epochs = math.ceil(options.updates * options.batch / options.images)
        for compiled in (False, True) if options.compile else (False,):
            done = foveate.finetune(
                {"name": options.model, "drop_path": 0.1},
                {
                    "train": f"shards:{folder}/{{split}}-*.tar",
                    "batch": options.batch,
                    "repeats": 1,
                    "workers": options.workers,
                },
                optim={"warmup_epochs": 1},
                loop={
                    **{"epochs": epochs, "check_every": epochs, "compile": compiled},
                    **{"precision": options.precision, "device": options.device, "log_every": 10},
                },
                recipe=options.recipe,
                out=folder / f"run-{compiled}",
                progress=False,
            )
            loss = done.history["train/loss"].dropna()
            cell = {
                "compiled": compiled,
                **{"updates": done["updates"], "images": options.images, "batch": options.batch},
                **done["throughput"],
                "minutes": done["minutes_of_this_process"],
                "accuracy": done["accuracy"],
                "loss": loss.round(4).tolist(),
            }
            print(json.dumps(cell), flush=True)
            cells.append(cell)
    return {
        **{"what": "run", "recipe": options.recipe, "model": options.model},
        **{"precision": options.precision, "workers": options.workers},
        **{"kilobytes_per_image": round(kilobytes, 1), "cells": cells},
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("steps", "run"))
    add("--model", default="deit_small_patch16_224")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--jobs", nargs="+", choices=tuple(JOBS), default=list(JOBS), help="jobs (steps)")
    add(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="precisions (steps)",
    )
    add("--batches", nargs="+", type=int, default=[128], help="batch sizes (steps)")
    add("--rounds", type=int, default=30, help="rounds (steps); fewer than 30 are a trial")
    add("--recipe", default="imagenet_deit_s", help="recipe (run)")
    add("--precision", default="bf16-mixed", help="precision (run)")
    add("--batch", type=int, default=256, help="batch size (run)")
    add("--updates", type=int, default=500, help="least number of updates (run); epochs are whole")
    add("--images", type=int, default=12_800, help="training images (run)")
    add("--workers", type=int, default=10, help="processes that read images (run)")
    add("--compile", action="store_true", help="add a run with loop.compile=true (run)")
    add("--out", type=Path)
    options = parser.parse_args()
    record = steps(options) if options.what == "steps" else run(options)
    record |= {"machine": machine.facts(options.device), "commit": machine.commit()}
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
