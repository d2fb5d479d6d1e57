"""Run every method on a small trained model that ships with the package.

Takes several minutes on two cores and downloads nothing: accuracy on 2 000 images of
Fashion-MNIST, multiply-adds, and measured speed at batch 64 and 1, as a table here and as a page
with plots and pictures. It runs the comparison "demo" (foveate compare --list). Then a detector is
run on 100 scenes, with all patches and with SViT; this part needs foveate[dense].

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
    add(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="folder for the page (default: out/demo)",
    )
    add(
        "--rounds",
        type=int,
        default=20,
        metavar="N",
        help="number of timed rounds (default: 20)",
    )
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default)")
    add("--quick", action="store_true", help="use 200 images and 3 rounds, to see that it works")


def run(args: argparse.Namespace) -> None:
    """Run it, print the table, and say where the page is."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    from foveate import machine

    device = machine.device_of(args.device)
    machine.tune_malloc(device)
    from foveate.files import made_folder

    with made_folder(args.out):
        _demo(args, device)


def _demo(args: argparse.Namespace, device: str) -> None:
    from foveate import machine
    from foveate.bench.progress import progress_bar
    from foveate.measure.demo import run_demo
    from foveate.measure.page import REMARK
    from foveate.measure.sheets import sheets, show, terminal

    rounds = 3 if args.quick else args.rounds
    settings = [f"evaluate.rounds={rounds}", f"evaluate.device={device}"]
    settings += ["evaluate.limit=200"] * args.quick
    with progress_bar() as progress:
        results, written = run_demo(
            args.out, tuple(settings), command=machine.command("foveate"), progress=progress
        )
    console = terminal()
    for sheet in sheets(results, blocks=False):
        show(sheet, console)
    console.print(REMARK, soft_wrap=True)
    print(f"The page with plots and pictures: {written[-1]}")
