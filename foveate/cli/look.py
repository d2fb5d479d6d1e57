"""Look into pre-training runs: heterogeneity of hidden tokens by layer, affinity maps, pictures.

RUN is the folder of a run, finished or not, or a .safetensors file of its weights. All weights are
measured on the same images with the same masks. Heterogeneity says how evenly a hidden token
resembles the visible ones: 1 means all of them equally, 0 a single one. It depends on the
similarity: with raw and scaled dot products it falls wherever norms grow with depth, even in some
untrained networks, so compare with --untrained.

In a terminal:
  foveate look runs/pretrain-fashion_part_mae
  foveate look runs/simmim runs/simmim-mto --untrained --out results/
  foveate look runs/simmim --epochs 10 30 60 --similarity raw --images 256
  foveate look runs/simmim/snapshots/epoch-0010.safetensors --data folder:photos --image 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a .safetensors file of its weights",
    )
    add(
        "--epochs",
        nargs="+",
        metavar="E",
        help="epochs to measure, or all (default: the last epoch, and at most 6 snapshots)",
    )
    add("--untrained", action="store_true", help="measure untrained weights of the same model too")
    add(
        "--similarity",
        choices=("cosine", "layernorm", "scaled", "raw"),
        default="cosine",
        help="how the similarity of tokens is computed (default: cosine)",
    )
    add(
        "--temperature",
        type=float,
        default=0.1,
        metavar="T",
        help="temperature that divides cosines (default: 0.1)",
    )
    add(
        "--data",
        metavar="SPEC",
        help="images to measure on, without labels (default: those of the run)",
    )
    add(
        "--images",
        type=int,
        default=64,
        metavar="N",
        help="number of images to use, evenly spaced (default: 64)",
    )
    add(
        "--image",
        type=int,
        default=0,
        metavar="K",
        help="image to draw affinity maps for, counted from 0 (default: 0)",
    )
    add(
        "--layers",
        type=int,
        nargs="+",
        default=[],
        metavar="L",
        help="layers to draw affinity maps for (default: four, evenly spaced)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the masks (default: 0)")
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default)")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for look.json and pictures (default: RUN/look, or look for several runs)",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write."""
    epochs = _epochs(args.epochs)
    from foveate.files import made_folder

    with made_folder(args.out):
        _look(args, epochs)


def _look(args: argparse.Namespace, epochs: tuple[float, ...] | None) -> None:
    from foveate import machine
    from foveate.measure.look import Choices, alarms, look, sheet, write
    from foveate.measure.sheets import show, terminal
    from foveate.mim.heterogeneity import Similarity

    choices = Choices(
        epochs=epochs,
        untrained=args.untrained,
        similarity=Similarity(args.similarity, args.temperature),
        data=args.data,
        images=args.images,
        seed=args.seed,
        image=args.image,
        layers=tuple(args.layers),
        device=args.device,
    )
    found = look(args.runs, choices, command=machine.command("foveate"))
    show(sheet(found), terminal())
    for text in alarms(found):
        print(text)
    for path in write(found, args.out or _folder(args.runs)):
        print(f"wrote    {path}")


def _folder(runs: list[Path]) -> Path:
    """Return the default folder; a single file or several runs do not overwrite a run's own."""
    if len(runs) > 1:
        return Path("look")
    return runs[0] / "look" if runs[0].is_dir() else runs[0].parent / f"look-{runs[0].stem}"


def _epochs(given: list[str] | None) -> tuple[float, ...] | None:
    """Return the epochs: numbers, None for all, () where none were given."""
    if given == ["all"]:
        return None
    try:
        return tuple(map(float, given or ()))
    except ValueError:
        raise ValueError(f"--epochs takes numbers, or all; got {' '.join(given or ())}") from None
