"""Count what a data set holds, make scenes for detection, or say where to get Fashion-MNIST.

Scenes are small pictures of garments on clutter, with boxes, masks and label maps. They are made of
the part of Fashion-MNIST that ships with the package. `data scenes FOLDER` writes them as files,
which coco:FOLDER and masks:FOLDER open; the data set "scenes" is the same without any file.

In a terminal:
  foveate data fashion-mnist                          # where to get the whole of it
  foveate data fashion-mnist FOLDER                   # check the files in FOLDER
  foveate data scenes FOLDER --size 96 --train 2000   # write scenes
  foveate data coco:FOLDER                            # count images and objects
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.data.sources.base import Tell

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
    add(
        "name",
        metavar="NAME",
        help="fashion-mnist, scenes, or a data set such as folder:PATH or coco:PATH",
    )
    add(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="where Fashion-MNIST is, or where scenes are written",
    )
    # Their defaults are those of ``Scenes``, which takes seconds to import.
    add("--size", metavar="N or HxW", help="size of scenes in pixels (default: 96)")
    add("--train", type=int, metavar="N", help="number of training scenes (default: 2000)")
    add("--val", type=int, metavar="N", help="number of validation scenes (default: 500)")
    add("--test", type=int, metavar="N", help="number of test scenes (default: 500)")
    add("--seed", type=int, metavar="N", help="seed of the scenes (default: 0)")
    add("--colour", action="store_true", default=None, help="make scenes in colour, not grey")
    add(
        "--clutter",
        type=float,
        metavar="SHARE",
        help="difficulty of the scenes, from 0 to 1 (default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    """Print where to get Fashion-MNIST, check it, write scenes, or count a data set."""
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
    from foveate.data.sources import Scenes, scene_size, write_scenes

    if "size" in options:
        options["size"] = scene_size(options["size"])
    made = Scenes(**options)
    write_scenes(folder, made, _shown("scenes"))
    print(
        f"{folder} holds {made.train} training, {made.val} validation and {made.test} test scenes: "
        f"coco:{folder} has their boxes and masks, masks:{folder} their label maps"
    )


def _shown(what: str) -> Tell:
    """Return a function that iterates over numbers and shows how far it is, on the error output."""
    from rich.console import Console
    from rich.progress import track

    bar = Console(stderr=True)
    return lambda numbers: track(numbers, what, console=bar, transient=True)


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
    counts = {
        split: source.class_counts(_shown(f"counting {split}")) for split, source in splits.items()
    }
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
