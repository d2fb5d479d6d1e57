"""Say where to get a data set, and check what is on disk.

A part of Fashion-MNIST ships with the package: foveate.data.fashion_mnist_mini().

In a terminal:
  foveate data fashion-mnist
  foveate data fashion-mnist FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
    parser.add_argument("name", choices=("fashion-mnist",), help="of the data set")
    parser.add_argument("folder", nargs="?", type=Path, help="where it is, to be checked")


def run(args: argparse.Namespace) -> None:
    """Say how, or check."""
    if args.folder is None:
        print(_HOW)
        return
    from foveate.data import find_fashion_mnist

    print(f"{find_fashion_mnist(args.folder)} holds the whole of Fashion-MNIST, undamaged")
