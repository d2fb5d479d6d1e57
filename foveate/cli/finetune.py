"""Fine-tune a plain ViT, on whole images or with random patches hidden.

In a terminal:
  foveate finetune --list
  foveate finetune fashion_part_full
  foveate finetune fashion_part_masked model.start=runs/finetune-fashion_part_full
  foveate finetune my.yaml data.train=folder:photos optim.lr=1e-4 --out runs/mine
  foveate finetune --resume runs/mine
  torchrun --nproc-per-node 8 -m foveate finetune imagenet_mae_b_masked data.train=folder:imagenet
"""

from __future__ import annotations

import argparse

from foveate.cli.training import add_recipe_arguments, run_job

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_recipe_arguments(parser, "finetune", resumable=True)


def run(args: argparse.Namespace) -> None:
    """Fine-tune, and say what came of it."""
    run_job("finetune", args)
