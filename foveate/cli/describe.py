"""Count what a model costs with a method: tokens, multiply-adds, parameters.

Each METHOD is described for itself. The model is not run, and the weights of a timm name are not
fetched, because they do not matter here. Only a --budget in time times this machine first.

In a terminal:
  foveate describe deit_small_patch16_224 "evit(keep=0.7)"
  foveate describe deit_base_patch16_224 evit tome --budget 0.6x
  foveate describe dynamicvit.pth --image-size 384
"""

from __future__ import annotations

import argparse

from foveate.cli.convert import image_size
from foveate.cli.models import add_model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--budget",
        help='cost to solve the rate of each METHOD for: "2.9 GMACs", 0.6x or 60%% of the '
        'multiply-adds, or a time on this machine: "1.5x faster", "12 ms, batch 8"',
    )
    add(
        "--image-size",
        type=image_size,
        metavar="N or HxW",
        help="image size to count for (default: the model's own)",
    )


def run(args: argparse.Namespace) -> None:
    """Print the facts of each."""
    import foveate
    from foveate.cli.models import open_models
    from foveate.core import ReducedViT

    if args.budget and not args.methods:
        raise ValueError("--budget sets the rate of a METHOD; name one")
    models = open_models(args.model, args.methods, untrained=True, budget=args.budget)
    for number, model in enumerate(models):
        if number:
            print()
        if isinstance(model, ReducedViT):
            print(foveate.describe(model, args.image_size))
            continue
        counted = foveate.count(model, args.image_size)
        print(f"{args.model}, without a method")
        print(f"tokens per block: {' '.join(str(n) for n in counted.tokens)}")
        print(f"GMACs: {counted.macs / 1e9:.4g}")
        print(f"parameters: {counted.parameters:,}")
