"""Measure time and memory of a training step of detectors and segmenters.

    python benchmarks/dense_steps.py --coco FOLDER --out dense_steps.json

Each case trains for a few updates in a process of its own, as its recipe says, but for what stands
in CASES. Seconds are of the clock, for an update with everything between two of them; memory is the
most that the process held resident at any time, which includes torch and foveate (their share
stands beside it). The cases at full size need a COCO folder; weights are random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCENES = {"data.val_limit": 20, "loop.max_steps": 41}
FULL = {
    **{"model.start": None, "data.batch": 1, "data.workers": 1, "data.augment.zoom": 0},
    **{"data.val_limit": 1, "loop.max_steps": 7, "loop.precision": "32"},
}

# Name in the table, job, recipe, and settings that differ.
CASES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "scenes, Mask R-CNN": ("detect", "scenes", SCENES),
    "scenes, Mask R-CNN with svit": ("detect", "scenes", {**SCENES, "method": "svit(keep=0.7)"}),
    "scenes, segmenter": ("segment", "scenes", SCENES),
    "scenes, segmenter with svit": ("segment", "scenes", {**SCENES, "method": "svit(keep=0.7)"}),
    "COCO, ViT-Adapter-T": ("detect", "coco_adapter_t", FULL),
    "COCO, ViT-Adapter-T with svit": (
        *("detect", "coco_adapter_t"),
        {**FULL, "method": "svit(keep=0.7)"},
    ),
}


def trained(job: str, recipe: str, settings: Mapping[str, Any], out: Any) -> None:
    """Train in this process, and send what it took through the pipe ``out``."""
    from foveate import config, machine
    from foveate.train.detect import detect
    from foveate.train.segment import segment

    machine.tune_malloc("cpu", Path(__file__).name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    read = config.read(config.recipe_class(job), config.find_recipe(job, recipe), said)
    with tempfile.TemporaryDirectory() as folder:
        run = detect if job == "detect" else segment
        result = run(read, Path(folder), progress=False, say=lambda _: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.send(
        {
            "images_in_a_step": read.data.batch,
            "seconds": read.data.batch / result["throughput"]["images_per_second"],
            "peak_mb": peak / 1024,
            "libraries_mb": before / 1024,
            "updates": result["updates"],
        }
    )


def main() -> None:
    """Measure all cases, print a row for each and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--coco", help="COCO folder, for the cases at full size")
    parser.add_argument("--only", nargs="+", default=list(CASES), help="names of cases")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    from foveate import machine

    rows = {}
    for name, (job, recipe, settings) in CASES.items():
        full = recipe.startswith("coco")
        if name not in args.only or (full and args.coco is None):
            continue
        more = {"data.train": f"coco:{args.coco}"} if full else {}
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=trained, args=(job, recipe, {**settings, **more}, send)
        )
        process.start()
        send.close()
        found = rows[name] = receive.recv()
        process.join()
        print(
            f"{name:32} {found['images_in_a_step']:2} images  {found['seconds']:6.2f} s  "
            f"peak {found['peak_mb']:6.0f} MB (libraries {found['libraries_mb']:.0f} MB)",
            flush=True,
        )
    if args.out is not None:
        about = {
            "command": machine.command(f"python benchmarks/{Path(__file__).name}"),
            "commit": machine.commit(),
            "machine": machine.facts("cpu"),
        }
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
