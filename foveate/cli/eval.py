"""Evaluate models: accuracy, occlusion, pruning without training, statistics of tokens, speed.

Accuracy and multiply-adds are always measured, of every model and every method on it. A method
that does not name its rate is taken at every one of --rates; a model that was saved with a method
comes with that one, and with others of the same name if they are given. The other parts are asked
for by name:
  --occlusion   accuracy with patches of the image dropped at random, for each model as it is given
  --pruning     a plain model pruned at three stages, by chance and by attention, without training
  --statistics  which patches each method keeps, where, how often, and what it brings back
  --speed       images a second, all models and methods in one interleaved run at each batch size

In a terminal:
  foveate eval demo evit "tome(r=3)" --rates .5 .7 .9 --speed --out results/
  foveate eval vit.safetensors --data folder:photos --occlusion --pruning --out results/
  foveate eval full/ --models masked/ --data folder:photos --occlusion 0 .5 .9 --mask-seeds 5
  foveate eval svit/ --data folder:photos --statistics --device cuda --precision bf16 --workers 8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from foveate.cli.models import MODEL_HELP

__all__ = ["add_arguments", "run"]

_T = TypeVar("_T")

_DEMO = "fashion-mnist"  # what the demo model was trained on; a part of it ships


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("model", help=MODEL_HELP)
    add("methods", nargs="*", default=[], metavar="METHOD", help='such as "evit(keep=0.7)"')
    parser.set_defaults(more="methods")
    add("--models", nargs="+", default=[], metavar="MODEL", help="further models, for comparison")
    add("--data", metavar="SPEC", help="a data set (the run's own, and Fashion-MNIST for the demo)")
    add(
        "--split",
        choices=("train", "val", "test", "all"),
        help="of the data (the first that there is of test, val and all)",
    )
    add("--val-share", type=float, metavar="SHARE", help="that training held out as val (0.1)")
    add("--split-seed", type=int, metavar="N", help="of that division (0)")
    add("--batch", type=int, default=64, metavar="N", help="images a call (64)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images (0)")
    add("--limit", type=int, metavar="N", help="use so many images, evenly spaced")
    add("--rates", type=float, nargs="+", default=[], metavar="RATE", help="keep, r or K")
    add(
        "--occlusion",
        type=float,
        nargs="*",
        metavar="RATIO",
        help="shares of patches to drop (0 .1 ... .9 .95)",
    )
    add("--mask-seeds", type=int, default=3, metavar="N", help="of occlusion and pruning (3)")
    add("--pruning", type=float, nargs="*", metavar="RATE", help="shares a stage keeps (.3 .5 .7)")
    add("--statistics", action="store_true", help="of tokens, for every method")
    add(
        "--speed",
        type=int,
        nargs="*",
        metavar="BATCH",
        help="time everything in one interleaved run for each batch size (that of --batch)",
    )
    add("--rounds", type=int, default=30, metavar="N", help="rounds of each run of --speed (30)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda (auto)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: mixed (fp32)")
    add("--seed", type=int, default=0, metavar="N", help="of new parameters and order (0)")
    add("--out", type=Path, metavar="DIR", help="folder for JSON, CSV, Markdown and pictures")
    add("--strict", action="store_true", help="stop at the first image that cannot be read")
    add("--untrained", action="store_true", help="timm models with random weights")


def run(args: argparse.Namespace) -> None:
    """Evaluate, print, and write."""
    names = [args.model, *args.models]
    images = _images(args, names)
    if args.out is not None:  # an unwritable place is said before the work
        args.out.mkdir(parents=True, exist_ok=True)
    from foveate.bench import machine

    device = machine.device_of(args.device)
    if args.speed is not None:
        machine.tune_malloc(device)

    from foveate.bench.progress import progress_bar
    from foveate.convert import open_base
    from foveate.measure import RATES, RATIOS, Plan, evaluate, write
    from foveate.measure.sheets import sheets, show, terminal

    plain = ("mask_seeds", "statistics", "rounds", "batch", "workers", "limit", "precision")
    plan = Plan(
        **images,
        **{name: getattr(args, name) for name in (*plain, "strict", "seed")},
        methods=tuple(args.methods),
        rates=tuple(args.rates),
        occlusion=_chosen(args.occlusion, RATIOS),
        pruning=_chosen(args.pruning, RATES),
        speed=_chosen(args.speed, (args.batch,)),
        device=device,
    )
    models = {
        label: open_base(name, untrained=args.untrained)
        for label, name in zip(_labels(names), names, strict=True)
    }
    with progress_bar() as progress:
        found = evaluate(models, plan, command=machine.command("foveate"), progress=progress)
    if args.untrained:
        found.about["settings"]["weights"] = "random"
    console = terminal()
    for sheet in sheets(found, blocks=False):
        show(sheet, console)
    for label, about in found.about["models"].items():
        if about["unreadable"]:
            print(f"{label}: {about['unreadable']} images could not be read")
    if args.out is not None:
        for path in write(found, args.out):
            print(f"wrote    {path}")


def _images(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return what is evaluated on: as asked for, or the final images of the runs themselves."""
    given = {"split": args.split, "val_share": args.val_share, "split_seed": args.split_seed}
    asked = {name: value for name, value in given.items() if value is not None}
    if args.data is not None or set(names) == {"demo"}:
        return {"data": args.data or _DEMO, **asked}
    from foveate.data import final_images

    found = {json.dumps(data): data for name in names if (data := _trained_on(Path(name)))}
    if len(found) != 1:
        raise ValueError("say with --data what to evaluate on, such as folder:PATH")
    data = next(iter(found.values()))
    spec, split = final_images(data["train"], data.get("val"), data.get("test"))
    own = {"data": spec, "split": split}
    own |= {name: data[name] for name in ("val_share", "split_seed") if name in data}
    return own | asked


def _trained_on(path: Path) -> dict[str, Any] | None:
    """Return the data of a run, if the path is in one."""
    for folder in (path, path.parent):
        if (folder / "recipe.yaml").is_file() and (folder / "result.json").is_file():
            from foveate import config

            return dict(config.load(folder / "recipe.yaml")["data"])
    return None


def _chosen(given: list[_T] | None, default: Sequence[_T]) -> tuple[_T, ...]:
    """Return the values of an option that may stand alone: none, the default, or its own."""
    if given is None:
        return ()
    return tuple(given or default)


def _labels(names: Sequence[str]) -> list[str]:
    """Return the last part of each name, and more of it where two models would share it."""
    parts = [Path(name).parts or (name,) for name in names]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"each model once, got {', '.join(names)}")
