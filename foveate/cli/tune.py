"""Find the method that meets a target speed and changes the model's answers least.

The search needs no labels and no training. One half of the images chooses the method and its
schedule (how many tokens it removes in which block), the other half measures the choice. The
answers with a method are compared with those without: the classes of a classifier, or the features
of all patches of a model without a head. The output folder gets the chosen model, which
foveate.load and every command open, a table (tune.csv, tune.json) and a picture.

In a terminal:
  foveate tune deit_small_patch16_224 --images photos/ --target "1.6x faster"
  foveate tune runs/finetune --images photos/ --target "12 ms, batch 8" --out fast/
  foveate tune demo --images photos/ --target 60% --methods evit tome
  foveate tune vit_small_patch14_dinov2 --images photos/ --target "2x faster" --judge features
"""

from __future__ import annotations

import argparse
from pathlib import Path

from foveate.cli.models import MODEL, add_untrained
from foveate.cli.threads import add_threads, check_threads, prepare_timing

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add(
        "--images",
        nargs="+",
        required=True,
        metavar="PATH",
        help="image files and folders like those that the model will see; no labels are needed",
    )
    add(
        "--target",
        default="1.5x faster",
        metavar="BUDGET",
        help='what a pass may cost: "1.6x faster", "12 ms, batch 8", "2.4 GMACs" or 60%% of the '
        "multiply-adds (default: 1.5x faster)",
    )
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="methods to search, beside random (default: all that run without training)",
    )
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for the choice, the table and the picture (default: runs/tune-MODEL)",
    )
    add(
        "--count",
        type=int,
        default=64,
        metavar="N",
        help="number of images, drawn at random if there are more (default: 64)",
    )
    add(
        "--judge",
        choices=("classes", "features"),
        help="what must agree: classes, or features of all patches for dense use (default: classes "
        "where the model has some)",
    )
    add(
        "--tries",
        type=int,
        default=60,
        metavar="N",
        help="moves that are tried to improve each of the best two schedules (default: 60)",
    )
    add(
        "--rounds",
        type=int,
        default=30,
        metavar="N",
        help="timed rounds at the end (default: 30, the fewest that a claim needs; 0 times only "
        "what a target in time needs)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of all that is drawn (default: 0)")
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default)")
    add_threads(parser)
    add_untrained(parser)


def run(args: argparse.Namespace) -> None:
    """Search, print, and say where the files are."""
    check_threads(args)
    prepare_timing(args)

    from foveate.bench.progress import progress_bar
    from foveate.convert import open_base
    from foveate.measure.sheets import show, terminal
    from foveate.tuning import tune

    model = open_base(args.model, untrained=args.untrained).to(args.device)
    images = args.images[0] if len(args.images) == 1 else args.images
    with progress_bar() as progress:
        found = tune(
            model,
            images,
            args.target,
            methods=args.methods,
            out=args.out,
            count=args.count,
            judge=args.judge,
            seed=args.seed,
            tries=args.tries,
            rounds=args.rounds,
            name=Path(args.model).name,
            progress=progress,
        )
    console = terminal(160)
    for sheet in found.sheets():
        show(sheet, console)
    print("\n".join(found.lines()))
    print(f"wrote    {found.path}: the model, tune.csv, tune.json, frontier.png and frontier.svg")
