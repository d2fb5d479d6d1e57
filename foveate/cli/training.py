"""The part shared by commands that run recipes: their arguments, and reading the recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_recipe_arguments", "begin", "run_job", "show_recipes"]

_TRAINERS = {name: (name, name) for name in ("adapt", "detect", "segment")}


def add_recipe_arguments(parser: Any, job: str, *, resumable: bool, more: str = "") -> None:
    """Describe the command line of a job; its settings are listed when help is asked for.

    Args:
        parser: parser of the command.
        job: name of the job.
        resumable: whether its runs can be resumed.
        more: what else the command takes in the place of a recipe, for the help.
    """
    parser.more_help = lambda: _settings(job)
    add = parser.add_argument
    add(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help=f"name of a recipe that ships (see --list), or a YAML file{more}",
    )
    add(
        "settings",
        nargs="*",
        default=[],
        metavar="key=value",
        help="changes of the recipe's settings, such as optim.lr=1e-4 or "
        "data.train=folder:photos; all settings are listed below",
    )
    parser.set_defaults(more="settings")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"folder for the run's files (default: runs/{job}-RECIPE)",
    )
    add("--list", action="store_true", help="list the recipes that ship, and stop")
    if resumable:
        add(
            "--resume",
            action="store_true",
            help=f"resume an interrupted run: foveate {job} --resume FOLDER; with a larger "
            "loop.epochs, loop.max_steps or loop.patience a finished run trains on",
        )
    add("--print", action="store_true", help="print the recipe with all its settings, and stop")


def show_recipes(job: str) -> None:
    """Print the recipes of a job with the first line of each."""
    from rich.console import Console
    from rich.table import Table

    from foveate import config

    table = Table("recipe", "what it does", box=None, pad_edge=False)
    for name, header in config.headers(job).items():
        table.add_row(name, header)
    Console().print(table)


def _open_recipe(job: str, cls: type, args: argparse.Namespace) -> tuple[Any, Path]:
    """Return the recipe with its changes, and the folder of the run."""
    from foveate import config

    resume = getattr(args, "resume", False)
    if resume:
        if args.out is None and args.recipe:
            args.out, args.recipe = Path(args.recipe), None
        settings = [*([args.recipe] if args.recipe else []), *args.settings]
        from foveate.train.recipe import LENGTHS

        lengths = tuple(f"loop.{name}=" for name in LENGTHS)
        if args.out is None or not all(text.startswith(lengths) for text in settings):
            raise ValueError(
                f"a run goes on with its own recipe: foveate {job} --resume FOLDER, and at most "
                "loop.epochs, loop.max_steps or loop.patience to make it longer"
            )
        path = args.out / "recipe.yaml"
        if not path.is_file():
            raise ValueError(f"{args.out} holds no run to resume: it has no recipe.yaml")
        return config.read(cls, path, settings), args.out
    if args.recipe is None:
        raise ValueError(f"name a recipe; foveate {job} --list shows those that ship")
    if "=" in args.recipe:
        raise ValueError(f"the recipe comes first, then settings; got {args.recipe!r}")
    path = config.find_recipe(job, args.recipe)
    return config.read(cls, path, args.settings), args.out or Path("runs", f"{job}-{path.stem}")


def _settings(job: str) -> str:
    """Return the help on all settings of a job, for recipes and the command line."""
    from foveate import config

    return (
        "Settings and their defaults, as key=value on the command line and as YAML in a recipe:\n"
        f"{config.explain(config.recipe_class(job))}\n"
    )


def begin(job: str, args: argparse.Namespace) -> tuple[Any, Path] | None:
    """Return the recipe and the run's folder; None after only listing or printing."""
    if args.list:
        show_recipes(job)
        return None
    from foveate import config

    recipe, out = _open_recipe(job, config.recipe_class(job), args)
    if args.print:
        print(config.dump(recipe), end="")
        return None
    from foveate import machine

    machine.tune_malloc("cpu")  # training on a CPU allocates large activations in every step
    return recipe, out


def run_job(job: str, args: argparse.Namespace) -> None:
    """List or print recipes, or train and print the result."""
    begun = begin(job, args)
    if begun is None:
        return
    recipe, out = begun
    from importlib import import_module

    from foveate.train.screens import last_screen

    room, name = _TRAINERS.get(job, ("run", "train"))
    train = getattr(import_module(f"foveate.train.{room}"), name)
    result = train(recipe, out, resume=args.resume, say=print)
    if "model" in result:  # the first of several processes
        print(last_screen(job, result, out))
