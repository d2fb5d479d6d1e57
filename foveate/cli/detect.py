"""Train a detector with boxes, or boxes and masks, on a ViT; dense or with a method.

The paper of SViT trains dense first; a second run starts from the first one and adds the gates.

In a terminal:
  foveate detect --list
  foveate detect scenes
  foveate detect scenes_svit model.start=runs/detect-scenes
  foveate detect my.yaml data.train=coco:photos model.start=runs/pretrain-folder_mae
  foveate detect --resume runs/detect-scenes
  foveate predict runs/detect-scenes --images photos/ --pictures pictures/
"""

from __future__ import annotations

import argparse

from foveate.cli.training import add_recipe_arguments, run_job

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_recipe_arguments(parser, "detect", resumable=True)


def run(args: argparse.Namespace) -> None:
    """Train, and say what came of it."""
    run_job("detect", args)
