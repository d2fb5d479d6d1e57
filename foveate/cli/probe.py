"""Measure frozen features, by a linear classifier and by nearest neighbours.

In a terminal:
  foveate probe --list
  foveate probe fashion_part model.start=runs/finetune-fashion_part_full
  foveate probe imagenet model.start=mae_pretrain_vit_base.pth data.train=folder:imagenet
"""

from __future__ import annotations

import argparse
from typing import Any

from foveate.cli.training import add_recipe_arguments, begin

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_recipe_arguments(parser, "probe", resumable=False)


def run(args: argparse.Namespace) -> None:
    """Take features, fit, and say what came of it."""
    begun = begin("probe", args)
    if begun is None:
        return
    recipe, out = begun
    from rich.progress import Progress

    from foveate.train.probe import probe

    with Progress(transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done)

        result = probe(recipe, out, advance)
    (split, images), *_ = (item for item in result["images"].items() if item[0] != "train")
    for name, words in (("knn", f"{recipe.neighbours} nearest neighbours"), ("linear", "linear")):
        if name in result:
            print(f"{words}: {result[name]:.2f} % of {images} {split} images")
