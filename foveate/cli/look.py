"""Look at pre-training runs: heterogeneity of hidden tokens by layer, affinity maps, pictures.

RUN is the folder of a run, ended or not, or a .safetensors file of its weights. Everything that
is looked at is measured on the same images with the same masks. Heterogeneity is how evenly hidden
tokens look at visible ones: 1 is at all of them alike, 0 at a single one. What it says depends on
the similarity: with raw and scaled dot products it sinks wherever norms grow with depth, in some
untrained networks already, so compare with --untrained.

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
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a file of weights")
    add(
        "--epochs",
        nargs="+",
        metavar="E",
        help="weights of a folder after these, or all (the last, and at most 6 snapshots)",
    )
    add("--untrained", action="store_true", help="new weights of the same model too")
    add(
        "--similarity",
        choices=("cosine", "layernorm", "scaled", "raw"),
        default="cosine",
        help="of tokens (cosine)",
    )
    add("--temperature", type=float, default=0.1, metavar="T", help="of cosines (0.1)")
    add("--data", metavar="SPEC", help="images of any kind, without labels (the run's own)")
    add("--images", type=int, default=64, metavar="N", help="use so many, evenly spaced (64)")
    add("--image", type=int, default=0, metavar="K", help="of them, for affinity maps (0)")
    add("--layers", type=int, nargs="+", default=[], metavar="L", help="of affinity maps (four)")
    add("--seed", type=int, default=0, metavar="N", help="of the masks (0)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda (auto)")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="for look.json and pictures (RUN/look; of several, look)",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write."""
    epochs = _epochs(args.epochs)
    from foveate.bench import machine
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
    if args.out is not None:  # an unwritable place is said before the work
        args.out.mkdir(parents=True, exist_ok=True)
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
