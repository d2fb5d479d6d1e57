"""Train an object detector on a ViT, with boxes or with boxes and masks.

Without `method` the detector is dense: it computes all tokens. The paper of SViT trains a dense
detector first; a second run then starts from it and adds the method.

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
