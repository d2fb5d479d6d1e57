"""Train a model with a method to answer as it does without it, on images without labels.

Give a recipe, or a model in its place; a model takes its settings from the recipe "folder". A model
that was saved with a method keeps it; any other needs method=METHOD.

In a terminal:
  foveate adapt --list
  foveate adapt tuned/ --images photos/
  foveate adapt deit_small_patch16_224 "method=evit(keep=0.7)" --images photos/
  foveate adapt fashion_part "method=tome(r=5)" train=blocks:4
  foveate adapt demo_dynamicvit data.train=fashion-mnist train=method
  foveate adapt --resume runs/adapt-folder
"""

from __future__ import annotations

import argparse
import json

from foveate.cli.training import add_recipe_arguments, run_job

__all__ = ["add_arguments", "run"]

_USUAL = "folder"  # the recipe of a model that is named without one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    more = "; or a model: a name of timm, a checkpoint, the folder of a run or of foveate.save"
    add_recipe_arguments(parser, "adapt", resumable=True, more=more)
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="folder of images without labels, the same as data.train=folder:FOLDER",
    )


def run(args: argparse.Namespace) -> None:
    """Adapt, and say what came of it."""
    given = []
    if args.images is not None:
        given.append(f"data.train={json.dumps(f'folder:{args.images}')}")
    if args.recipe is not None and not args.resume and not _is_recipe(args.recipe):
        # A model, or settings that name one: it brings its method or is given one.
        group, settings = ("{}", [args.recipe]) if "=" in args.recipe else (_model(args.recipe), [])
        given += [f"model={group}", "method=null", *settings]
        args.recipe = _USUAL
    args.settings = given + args.settings
    run_job("adapt", args)


def _is_recipe(name: str) -> bool:
    from foveate import config

    return name.endswith((".yaml", ".yml")) or name in config.list_recipes("adapt")


def _model(name: str) -> str:
    """Return the group "model" of a recipe for a model that is named in its place."""
    from foveate.jobs import model_group

    try:
        return json.dumps(model_group(name))
    except ValueError as error:
        raise ValueError(f"no recipe of that name (see --list), and {error}") from error
