"""Compare how early two pre-training runs become good: RAUC and epochs to match.

RUN_BASE and RUN_MTO are folders of pre-training runs whose recipes scored them during training
(probe.every), or CSV files with the columns epoch and METRIC. RAUC, the relative area under the
curve, divides the area under the curve of RUN_MTO by that of RUN_BASE; both areas lie above the
score of RUN_BASE at --from. Above 1, RUN_MTO is ahead: 1.4 means a gain 40 % larger than that of
RUN_BASE over the range, not 40 % more accuracy. "Epochs to match" is the first epoch at which
RUN_MTO is as good as RUN_BASE is at --at. Compare runs whose learning-rate schedules have the same
length. The command refuses runs on different data, curves that share no range, fewer than three
scores, and a base that gains nothing.

In a terminal:
  foveate rauc runs/simmim runs/simmim-mto
  foveate rauc runs/simmim runs/simmim-mto --from 100 --to 400 --at 800 --out results/
  foveate rauc runs/simmim runs/simmim-mto --over seconds
  foveate rauc base.csv mto.csv --metric probe/knn
  foveate rauc runs/base-0 runs/mto-0 --more-base runs/base-1 --more-mto runs/mto-1
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("base", type=Path, metavar="RUN_BASE", help="the run that is the yardstick")
    add("mto", type=Path, metavar="RUN_MTO", help="the run that may become good earlier")
    add(
        "--more-base",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs like RUN_BASE with other seeds",
    )
    add(
        "--more-mto",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs like RUN_MTO with the same seeds, in the same order",
    )
    add("--metric", default="probe/linear", help="score to compare (default: probe/linear)")
    add(
        "--over",
        default="epochs",
        help='horizontal axis of the curves: "epochs", or "seconds" of training (default: epochs)',
    )
    add(
        "--from",
        dest="start",
        type=float,
        metavar="E1",
        help="where the range begins (default: the first epoch that both runs have)",
    )
    add(
        "--to",
        dest="end",
        type=float,
        metavar="E2",
        help="where the range ends (default: the last epoch that both runs have)",
    )
    add(
        "--at",
        type=float,
        metavar="E_REF",
        help="epoch, or second, of RUN_BASE whose score RUN_MTO has to reach (default: its last)",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the table and the picture")


def run(args: argparse.Namespace) -> None:
    """Compare, print, and write."""
    from foveate.files import made_folder

    with made_folder(args.out):
        _compare(args)


def _compare(args: argparse.Namespace) -> None:
    from foveate import machine
    from foveate.measure.rauc import compare, figure, sheet
    from foveate.measure.sheets import show, terminal
    from foveate.measure.style import save

    found = compare(
        [args.base, *args.more_base],
        [args.mto, *args.more_mto],
        metric=args.metric,
        start=args.start,
        end=args.end,
        at=args.at,
        over=args.over,
    )
    show(sheet(found), terminal())
    if args.out is None:
        return
    found.about["command"] = machine.command("foveate")
    written = found.save(args.out / "rauc.json")
    written += save(figure(found), args.out / "rauc.svg", args.out / "rauc.png")
    for path in written:
        print(f"wrote    {path}")
