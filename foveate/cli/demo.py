"""Run every method on a small trained model that ships with the package.

Takes three to six minutes on two cores and downloads nothing: accuracy on 2 000 images of
Fashion-MNIST, multiply-adds, and measured speed at batch 64 and 1, as a table here and as a page
with plots and pictures.

In a terminal:
  foveate demo
  foveate demo --out demo/ --quick
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo"), help="folder for the page (out/demo)")
    add("--rounds", type=int, default=20, help="rounds of the timing (20)")
    add("--quick", action="store_true", help="200 images and 3 rounds: to see that it works")


def run(args: argparse.Namespace) -> None:
    """Run it."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    args.out.mkdir(parents=True, exist_ok=True)  # an unwritable place is said before the work

    from foveate.bench.machine import tune_malloc
    from foveate.demo import run_demo

    tune_malloc("cpu")
    run_demo(
        args.out,
        rounds=3 if args.quick else args.rounds,
        images=200 if args.quick else None,
    )
