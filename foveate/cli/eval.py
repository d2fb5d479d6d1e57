"""Evaluate models: accuracy (AP or mIoU), occlusion, pruning, token statistics and speed.

Accuracy and multiply-adds are always measured, for every model and for every METHOD on it. A METHOD
without a rate of its own is measured at each of --rates. A model that was saved with a method is
measured with it; METHODs may name that one alone, at other rates. Further parts on request:
  --occlusion   accuracy when patches of the image are dropped at random, for each model as given
  --pruning     accuracy when a plain model is pruned in three blocks without training, at random
                and by attention
  --statistics  which patches each method keeps, where, how often, and what it brings back
  --speed       images a second; all models and methods take turns in one run for each batch size

For detectors and segmenters the parts are AP or mean IoU, multiply-adds, the share of patches used,
and with --speed images a second of the network and of its backbone. The same model without its
method is measured beside them.

In a terminal:
  foveate eval demo evit "tome(r=3)" --rates .5 .7 .9 --speed --out results/
  foveate eval vit.safetensors --data folder:photos --occlusion --pruning --out results/
  foveate eval full/ --models masked/ --data folder:photos --occlusion 0 .5 .9 --mask-seeds 5
  foveate eval runs/detect-scenes_svit --speed --calibrate 64 --out results/
  foveate eval svit/ --data folder:photos --statistics --device cuda --precision bf16 --workers 8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from foveate.cli.models import add_model

__all__ = ["add_arguments", "run"]

_T = TypeVar("_T")

_DEMO = "fashion-mnist"  # what the demo model was trained on; a part of it ships


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="more models to evaluate beside the first",
    )
    add(
        "--data",
        metavar="SPEC",
        help="data set (default: that of the run, and Fashion-MNIST for the demo models)",
    )
    add(
        "--split",
        choices=("train", "val", "test", "all"),
        help="split of the data (default: test, or else val, or else all)",
    )
    add(
        "--val-share",
        type=float,
        metavar="SHARE",
        help="share of the training images that was held out as val (default: the run's, or 0.1)",
    )
    add(
        "--split-seed",
        type=int,
        metavar="N",
        help="seed that chose the held-out images (default: the run's, or 0)",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="number of images in one pass (default: 64; 1 for detectors and segmenters)",
    )
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="number of processes that read images (default: 0, the command itself)",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="number of images to use, evenly spaced (default: all)",
    )
    add(
        "--rates",
        type=float,
        nargs="+",
        default=[],
        metavar="RATE",
        help="rates (keep, r or K) for every METHOD that names none",
    )
    add(
        "--occlusion",
        type=float,
        nargs="*",
        metavar="RATIO",
        help="shares of patches to drop (default: 0 .1 ... .9 .95)",
    )
    add(
        "--mask-seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of random masks for --occlusion and --pruning (default: 3)",
    )
    add(
        "--pruning",
        type=float,
        nargs="*",
        metavar="RATE",
        help="shares of tokens that each of the three stages keeps (default: .3 .5 .7)",
    )
    add(
        "--statistics",
        action="store_true",
        help="count for every method which patches it keeps and how often",
    )
    add(
        "--speed",
        type=int,
        nargs="*",
        metavar="BATCH",
        help="batch sizes to time (default: that of --batch)",
    )
    add(
        "--rounds",
        type=int,
        default=30,
        metavar="N",
        help="number of timed rounds of --speed (default: 30)",
    )
    add(
        "--calibrate",
        type=int,
        default=0,
        metavar="N",
        help="for detectors and segmenters with gates: also evaluate with gates that are shifted "
        "to keep their target share of the patches on N training images (default: 0, not at all)",
    )
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default)")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="fp32 (default), or bf16 for automatic mixed precision",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of new parameters and of the order (default: 0)",
    )
    add("--out", type=Path, metavar="DIR", help="folder for JSON, CSV, Markdown and pictures")
    add("--strict", action="store_true", help="stop at the first image that cannot be read")
    add(
        "--untrained",
        action="store_true",
        help="give timm models random weights, not pretrained ones",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, print, and write."""
    names = [args.model, *args.models]
    images = _images(args, names)
    from foveate import machine

    device = machine.device_of(args.device)
    if args.speed is not None:
        machine.tune_malloc(device)
    from foveate.files import made_folder

    with made_folder(args.out):
        _evaluate(args, names, images, device)


def _evaluate(
    args: argparse.Namespace, names: list[str], images: dict[str, Any], device: str
) -> None:
    from foveate import machine
    from foveate.bench.progress import progress_bar
    from foveate.convert import open_base
    from foveate.dense import DenseModel
    from foveate.measure import RATES, RATIOS, Plan, evaluate, write
    from foveate.measure.sheets import sheets, show, terminal

    models = {
        label: open_base(name, untrained=args.untrained)
        for label, name in zip(_labels(names), names, strict=True)
    }
    kinds = {isinstance(model, DenseModel) for model in models.values()}
    if len(kinds) > 1:
        raise ValueError(
            "detectors and segmenters are evaluated apart from classifiers: give --models of one "
            f"kind, got {', '.join(names)}"
        )
    (dense,) = kinds
    batch = (1 if dense else 64) if args.batch is None else args.batch
    plain = ("mask_seeds", "statistics", "rounds", "workers", "limit", "precision")
    plan = Plan(
        **images,
        **{name: getattr(args, name) for name in (*plain, "strict", "seed")},
        methods=tuple(args.methods),
        rates=tuple(args.rates),
        occlusion=_chosen(args.occlusion, RATIOS),
        pruning=_chosen(args.pruning, RATES),
        speed=_chosen(args.speed, (batch,)),
        calibration=args.calibrate,
        batch=batch,
        device=device,
    )
    if dense:
        found = _dense(models, plan)
    else:
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


def _dense(models: dict[str, Any], plan: Any) -> Any:
    """Evaluate detectors or segmenters."""
    from foveate import machine
    from foveate.bench.progress import progress_bar
    from foveate.measure import evaluate_dense

    with progress_bar() as progress:
        return evaluate_dense(models, plan, command=machine.command("foveate"), progress=progress)


def _images(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the images to evaluate on: those asked for, or the test images of the runs."""
    given = {"split": args.split, "val_share": args.val_share, "split_seed": args.split_seed}
    asked = {name: value for name, value in given.items() if value is not None}
    if args.val_share is not None and not 0 < args.val_share < 1:
        raise ValueError(f"--val-share must lie between 0 and 1, got {args.val_share:g}")
    from foveate.convert import SHIPPED

    demo = all(SHIPPED.get(name, "detector") != "detector" for name in names)
    if args.data is not None or demo:
        return {"data": args.data or _DEMO, **asked}
    from foveate.data import final_images

    found = {json.dumps(data): data for name in names if (data := _trained_on(Path(name)))}
    for name in names:
        local = not name.startswith("hf-hub:") and (Path(name).suffix or "/" in name)
        if local and not Path(name).exists():
            raise ValueError(f"{name} does not exist")
    if len(found) != 1:
        raise ValueError("say with --data what to evaluate on, such as folder:PATH")
    data = next(iter(found.values()))
    spec, split = final_images(data["train"], data.get("val"), data.get("test"))
    own = {"data": spec, "split": split}
    own |= {name: data[name] for name in ("val_share", "split_seed") if name in data}
    return own | asked


def _trained_on(path: Path) -> dict[str, Any] | None:
    """Return the data of a run, if the path belongs to one."""
    for folder in (path, path.parent):
        if (folder / "recipe.yaml").is_file() and (folder / "result.json").is_file():
            from foveate import config

            return dict(config.load(folder / "recipe.yaml")["data"])
    return None


def _chosen(given: list[_T] | None, default: Sequence[_T]) -> tuple[_T, ...]:
    """Return the values of an option that may be absent, without values, or with some."""
    if given is None:
        return ()
    return tuple(given or default)


def _labels(names: Sequence[str]) -> list[str]:
    """Return the last part of each name, or more of it if two names share that part."""
    parts = [Path(name).parts or (name,) for name in names]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"each model once, got {', '.join(names)}")
