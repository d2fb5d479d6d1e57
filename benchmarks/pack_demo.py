"""Pack the demo's training runs for the package: weights in half precision, results and logs.

    foveate finetune demo_base data.train=fashion-mnist:FOLDER
    foveate finetune demo_masked data.train=fashion-mnist:FOLDER
    python benchmarks/pack_demo.py runs --model
    foveate reduce demo_dynamicvit data.train=fashion-mnist:FOLDER   # and svit, spvit, static
    python benchmarks/pack_demo.py runs --methods

It writes foveate/data/files/demo_vit.safetensors and demo_METHOD/, and the recipe, result and
metrics of every run under benchmarks/results/demo_training/.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

import foveate
from foveate.measure.shipped import SHIPPED

ROOT = Path(__file__).parents[1]
FILES = ROOT / "foveate" / "data" / "files"
RESULTS = ROOT / "benchmarks" / "results" / "demo_training"


def halve(source: Path, target: Path) -> None:
    """Write a file's floats in half precision; loading makes them float32 again."""
    tensors = load_file(source)
    halved = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(halved, target)
    target.chmod(0o644)


def record(run: Path) -> None:
    """Copy the recipe, result and metrics of a run."""
    folder = RESULTS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "metrics.csv"):
        shutil.copy(run / name, folder / name)
    result = json.loads((run / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in ("recipe.yaml", "result.json"):
        text = (folder / name).read_text()
        # Remove the path of the data on the machine that trained.
        text = re.sub(r'fashion-mnist:[^"\n]+', "fashion-mnist:FOLDER", text)
        (folder / name).write_text(text)


def pack_method(run: Path, method: str, how: str) -> None:
    """Save the whole model, or only its gates if only they were trained."""
    model = foveate.load(run)
    target = FILES / f"demo_{method}"
    shutil.rmtree(target, ignore_errors=True)
    foveate.save(model, target, everything=how == "whole")
    weights = target / "foveate.safetensors"
    if how == "whole":
        halve(weights, weights)


def main() -> None:
    """Pack what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("runs", type=Path, help="folder of the training runs")
    parser.add_argument("--model", action="store_true", help="pack the base and the masked model")
    parser.add_argument(
        "--methods", action="store_true", help="pack the methods that were trained from it"
    )
    options = parser.parse_args()
    if options.model:
        masked = options.runs / "finetune-demo_masked"
        halve(masked / "model.safetensors", FILES / "demo_vit.safetensors")
        for run in (options.runs / "finetune-demo_base", masked):
            record(run)
    if options.methods:
        trained = {name: how for name, how in SHIPPED.items() if how != "model"}
        for name, how in trained.items():
            method = name.removeprefix("demo_")
            run = options.runs / f"reduce-{name}"
            pack_method(run, method, how)
            record(run)


if __name__ == "__main__":
    main()
