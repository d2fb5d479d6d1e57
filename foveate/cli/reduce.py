"""Train a model together with a method that drops, merges or skips tokens.

The method's own parameters (such as gates) and the model are trained with the method's losses.
`foveate list` shows the methods and which of them need training.

In a terminal:
  foveate reduce --list
  foveate reduce fashion_part_dynamicvit model.start=runs/finetune-fashion_part_masked
  foveate reduce fashion_part_dynamicvit "method=svit(keep=0.7)" --out runs/svit
  foveate reduce --resume runs/svit
  torchrun --nproc-per-node 8 -m foveate reduce imagenet_deit_s_dynamicvit data.train=folder:in1k
"""

from __future__ import annotations

import argparse

from foveate.cli.training import add_recipe_arguments, run_job

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_recipe_arguments(parser, "reduce", resumable=True)


def run(args: argparse.Namespace) -> None:
    """Train with a method, and say what came of it."""
    run_job("reduce", args)
