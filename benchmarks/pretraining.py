"""Pre-training on the part of Fashion-MNIST that ships, with and without MTO: runs and summary.

python benchmarks/pretraining.py run OUT     every run, one after another; several at once share
python benchmarks/pretraining.py sum OUT     tables, figures and numbers of what has finished

MAE and SimMIM, each without MTO, with it, and with other choices of it, 3 seeds; then fine-tuning
on 5 % of the labels from every backbone and from scratch. Runs that have finished are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
MODEL = (
    "model.options={img_size: 28, patch_size: 4, in_chans: 1, embed_dim: 96, depth: 4, "
    "num_heads: 3}"
)
SHARED = (
    MODEL,
    *("data.batch=64", "loop.epochs=16", "loop.pictures_every=16", "loop.tensorboard=false"),
    *("probe.every=4", "snapshots=4", "layers_every=4"),
)
# Names of arms and what they change; the first of a method is what others are compared with.
ARMS = {
    "base": (),
    "mto": ("mto.preset=default",),
    "mto-as-printed": ("mto.preset=default", "mto.direction=as_printed"),
    "mto-raw": ("mto.preset=default", "mto.similarity=raw"),
    "mto-paper": ("mto.preset=paper",),
}
METHODS = ("mae", "simmim")
LABELS = (  # 150 of 3 000 images, 15 of each class
    *("data.limit=150", "data.batch=50", "data.val_batch=500", "loop.epochs=80"),
    *("loop.check_every=20", "loop.tensorboard=false", "optim.lr=1e-3", "model.pool=avg"),
)


def jobs(seeds: tuple[int, ...]) -> list[tuple[str, list[str]]]:
    """Name and command of every run, most needed first."""
    found = [pre_training(m, a, s) for s in seeds for m in METHODS for a in ("base", "mto")]
    found += [job for seed in seeds for job in fine_tunings(seed)]
    variants = [arm for arm in ARMS if arm not in ("base", "mto")]
    found += [pre_training("mae", arm, seed) for seed in seeds for arm in variants]
    # SimMIM takes twice as long: one seed
    return found + [pre_training("simmim", arm, seeds[0]) for arm in variants]


def pre_training(method: str, arm: str, seed: int) -> tuple[str, list[str]]:
    """One backbone."""
    settings = [*SHARED, *ARMS[arm], f"loop.seed={seed}"]
    return f"{method}-{arm}-{seed}", ["pretrain", f"fashion_part_{method}", *settings]


def fine_tunings(seed: int) -> list[tuple[str, list[str]]]:
    """From both methods with and without MTO, and from scratch."""
    starts = {
        f"{method}-{arm}": f"{method}-{arm}-{seed}" for method in METHODS for arm in ("base", "mto")
    }
    found = []
    for name, start in {"scratch": None, **starts}.items():
        settings = [MODEL, *LABELS, f"loop.seed={seed}"]
        if start is not None:
            settings.append(f"model.start={{OUT}}/{start}/model.safetensors")
        found.append((f"labels-{name}-{seed}", ["finetune", "fashion_part_full", *settings]))
    return found


def run(out: Path, seeds: tuple[int, ...]) -> None:
    """Every job that no other process has begun."""
    out.mkdir(parents=True, exist_ok=True)
    for name, command in jobs(seeds):
        folder = out / name
        needed = [
            word.split("=")[1].replace("{OUT}", str(out)) for word in command if "{OUT}" in word
        ]
        if not all(Path(path).is_file() for path in needed):
            continue  # another process is at it; the next call comes back to this
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        words = [word.replace("{OUT}", str(out)) for word in command]
        with (out / f"{name}.log").open("w") as log:
            code = subprocess.call(
                [sys.executable, "-m", "foveate", *words, "--out", str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        print(name, "done" if code == 0 else f"failed with {code}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("run", "sum"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    if options.what == "run":
        run(options.out.resolve(), tuple(options.seeds))
