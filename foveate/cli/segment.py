"""Train a semantic segmenter on a ViT, which gives each pixel a class.

Without `method` the segmenter is dense: it computes all tokens. A second run can start from it and
add a method.

In a terminal:
  foveate segment --list
  foveate segment scenes
  foveate segment scenes_svit model.start=runs/segment-scenes
  foveate segment my.yaml data.train=masks:photos model.start=runs/pretrain-folder_mae
  foveate segment --resume runs/segment-scenes
"""

from __future__ import annotations

import argparse

from foveate.cli.training import add_recipe_arguments, run_job

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_recipe_arguments(parser, "segment", resumable=True)


def run(args: argparse.Namespace) -> None:
    """Train, and say what came of it."""
    run_job("segment", args)
