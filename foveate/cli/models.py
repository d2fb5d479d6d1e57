"""The argument MODEL: a file, a folder, a name of timm or the hub, or a model that ships."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODEL", "add_model", "add_untrained", "open_models"]

MODEL = (
    "name of a timm model, checkpoint file, folder of a run or of a model that foveate, timm or "
    "Hugging Face saved, hf-hub:OWNER/NAME for a model on the Hugging Face hub, or 'demo' for the "
    "small trained model that ships with the package ('demo_detector' is a detector)"
)


def add_model(parser: argparse.ArgumentParser, *, needed: bool = True, more: str = "") -> None:
    """Add the arguments MODEL and METHOD; ``more`` goes on with the help of MODEL."""
    parser.add_argument("model", nargs=None if needed else "?", metavar="MODEL", help=MODEL + more)
    parser.add_argument(
        "methods",
        nargs="*",
        default=[],
        metavar="METHOD",
        help='method to apply, such as "evit(keep=0.7)"',
    )
    parser.set_defaults(more="methods")


def add_untrained(parser: argparse.ArgumentParser) -> None:
    """Add the flag for a timm model without its weights."""
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="give a timm model random weights, not pretrained ones",
    )


def open_models(
    name: str, methods: Sequence[str], *, untrained: bool = False, budget: str | None = None
) -> list[nn.Module]:
    """Open a model and apply each method to it, sharing the weights; without methods as it is."""
    from foveate import api
    from foveate.convert import open_base
    from foveate.core import Reducer

    model = open_base(name, untrained=untrained)
    if not methods:
        return [model]
    own = getattr(model, "reducer", None)  # of a reduced ViT, or of a model around one
    if isinstance(own, Reducer) and own.name != "dense":
        raise ValueError(f"{name} has its own method {own!r}: give no other")
    return [api.apply(model, method, budget=budget).eval() for method in methods]
