"""Say what a data set holds, make scenes for detection, say where to get Fashion-MNIST.

A part of Fashion-MNIST ships with the package: foveate.data.fashion_mnist_mini(). Scenes are made
of it: garments on clutter with boxes, masks and label maps, which coco:FOLDER and masks:FOLDER
open; the spec "scenes" gives the same without any file.

In a terminal:
  foveate data fashion-mnist
  foveate data fashion-mnist FOLDER
  foveate data scenes FOLDER --size 96 --train 2000
  foveate data coco:FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

_HOW = """Fashion-MNIST: 60 000 training and 10 000 test images, 28 x 28, grey, ten kinds of
clothing. Copyright 2017 Zalando SE, MIT licence. 30 MB in four files:

  train-images-idx3-ubyte.gz  train-labels-idx1-ubyte.gz
  t10k-images-idx3-ubyte.gz   t10k-labels-idx1-ubyte.gz

Any of these gets them:

  python -c "from torchvision.datasets import FashionMNIST; FashionMNIST('FOLDER', download=True)"
  apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb FOLDER
     (Debian; the files are then in FOLDER/usr/share/datasets/fashion-mnist)
  the folder data/fashion of the GitHub repository zalandoresearch/fashion-mnist

Then `foveate data fashion-mnist FOLDER` checks them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("name", help="fashion-mnist, scenes, or the spec of a data set such as coco:FOLDER")
    add("folder", nargs="?", type=Path, help="where Fashion-MNIST is, or where scenes are written")
    # Their defaults are those of ``Scenes``, which takes seconds to import.
    add("--size", help="height and width of scenes, such as 96 (the default) or 96x128")
    add("--train", type=int, help="number of training scenes (2000)")
    add("--val", type=int, help="number of validation scenes (500)")
    add("--test", type=int, help="number of test scenes (500)")
    add("--seed", type=int, help="seed of the scenes (0)")
    add("--colour", action="store_true", default=None, help="make scenes in colour, not grey")
    add("--clutter", type=float, metavar="SHARE", help="how hard scenes are, from 0 to 1 (1)")


def run(args: argparse.Namespace) -> None:
    """Say how, check, make or describe."""
    names = ("size", "train", "val", "test", "seed", "colour", "clutter")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    making = args.name == "scenes" and args.folder is not None
    if options and not making:
        raise ValueError(f"--{next(iter(options))} is for `foveate data scenes FOLDER`")
    if making:
        _make(args.folder, options)
    elif args.name != "fashion-mnist":
        if args.folder is not None:
            raise ValueError(f"{args.name} takes no folder beside it, got {args.folder}")
        _describe(args.name)
    elif args.folder is None:
        print(_HOW)
    else:
        from foveate.data import find_fashion_mnist

        print(f"{find_fashion_mnist(args.folder)} holds the whole of Fashion-MNIST, undamaged")


def _make(folder: Path, options: dict[str, Any]) -> None:
    from rich.progress import track

    from foveate.data.sources import Scenes, scene_size, write_scenes

    if "size" in options:
        options["size"] = scene_size(options["size"])
    made = Scenes(**options)
    write_scenes(folder, made, lambda numbers: track(numbers, "scenes"))
    print(
        f"{folder} holds {made.train} training, {made.val} validation and {made.test} test scenes: "
        f"coco:{folder} has their boxes and masks, masks:{folder} their label maps"
    )


def _describe(spec: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from foveate.data import NoSplit, Source, open_source
    from foveate.data.sources import SPLITS

    splits: dict[str, Source] = {}
    for split in SPLITS:
        try:
            splits[split] = open_source(spec, split)
        except NoSplit:
            continue
    if not splits:
        raise ValueError(f"{spec} has none of the splits {', '.join(SPLITS)}")
    counts = {split: source.class_counts() for split, source in splits.items()}
    source = next(iter(splits.values()))
    what = "images" if source.labels_of[0] == "image" else source.labels_of[0]
    assert source.classes is not None
    table = Table("", *splits)
    table.add_row("images", *(str(len(source)) for source in splits.values()))
    if what != "images":
        table.add_row(what, *(str(count.sum()) for count in counts.values()))
    table.add_section()
    for number, name in enumerate(source.classes):
        row = [count[number] if number < len(count) else 0 for count in counts.values()]
        table.add_row(name, *map(str, row))
    Console().print(table)
    print(f"{what} of each class in {spec}")
