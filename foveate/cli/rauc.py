"""Say how much earlier a pre-training run gets good than another: RAUC and epochs to match.

RUN_BASE and RUN_MTO are folders of pre-training runs that were scored while they went on
(probe.every of their recipes), or CSV files with the columns epoch and METRIC, such as scores of
snapshots by foveate probe. RAUC is the area under the curve of RUN_MTO over that of RUN_BASE,
both counted from the score of RUN_BASE at --from. Above 1 RUN_MTO is ahead; 1.4 is 40 % more than
what RUN_BASE gains over the range, not 40 % more accuracy. Compare checkpoints inside one schedule:
a run that was annealed earlier is another experiment.

In a terminal:
  foveate rauc runs/simmim runs/simmim-mto
  foveate rauc runs/simmim runs/simmim-mto --from 100 --to 400 --at 800 --out results/
  foveate rauc base.csv mto.csv --metric probe/knn
  foveate rauc runs/base-0 runs/mto-0 --more-base runs/base-1 --more-mto runs/mto-1
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.evaluate.tables import Sheet
    from foveate.pretrain.rauc import Efficiency, Pair

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("base", type=Path, metavar="RUN_BASE", help="the run to compare with")
    add("mto", type=Path, metavar="RUN_MTO", help="the run that is to be ahead")
    add("--more-base", type=Path, nargs="+", default=[], metavar="RUN", help="further seeds")
    add("--more-mto", type=Path, nargs="+", default=[], metavar="RUN", help="theirs, in order")
    add("--metric", default="probe/linear", help="column of the scores (probe/linear)")
    add("--from", dest="start", type=float, metavar="E1", help="first epoch (all that is shared)")
    add("--to", dest="end", type=float, metavar="E2", help="last epoch (all that is shared)")
    add("--at", type=float, metavar="E_REF", help="epoch of RUN_BASE to match (its last)")
    add("--out", type=Path, metavar="DIR", help="folder for rauc.json and the picture")


def run(args: argparse.Namespace) -> None:
    """Compare, print, and write."""
    if args.out is not None:  # an unwritable place is said before the work
        args.out.mkdir(parents=True, exist_ok=True)
    from foveate.bench import machine
    from foveate.bench.report import terminal
    from foveate.evaluate.tables import printed
    from foveate.pretrain.rauc import compare, write

    found = compare(
        [args.base, *args.more_base],
        [args.mto, *args.more_mto],
        metric=args.metric,
        start=args.start,
        end=args.end,
        at=args.at,
    )
    console = terminal()
    for part in printed(_sheet(found)):
        console.print(part)
    if args.out is not None:
        for path in write(found, args.out, command=machine.command("foveate")):
            print(f"wrote    {path}")


def _sheet(found: Efficiency) -> Sheet:
    """A line for each pair; with several seeds also their mean, and that of the curves."""
    from foveate.evaluate.tables import Sheet
    from foveate.pretrain.rauc import PROTOCOL

    ends = [f"{side} @{epoch:g}" for side in ("base", "mto") for epoch in (found.start, found.end)]
    head = ("<runs", *ends, "RAUC", "matches at", "saves")
    body = [_line(f"{pair.other} over {pair.base}", pair) for pair in found.pairs]
    if len(found.pairs) > 1:
        over = (
            _over(found, name, form)
            for name, form in (("rauc", ".3f"), ("match", ".1f"), ("reduction", ".0%"))
        )
        body += [
            (f"mean ± std (n {len(found.pairs)})", "", "", "", "", *over),
            _line("means of the curves", found.mean),
        ]
    notes = [
        f"matches at: first epoch of the mto run that is as good as the base at epoch {found.at:g}",
        f"note: {PROTOCOL}",
    ]
    if any(pair.at_once for pair in (*found.pairs, found.mean)):
        notes.append("<=, >=: as good at its first score, and maybe before it")
    notes += [f"warning: {text}" for text in found.warnings]
    title = f"{found.metric}, epochs {found.start:g} to {found.end:g}"
    return Sheet(title, head, body, notes)


def _line(name: str, pair: Pair) -> tuple[str, ...]:
    scores = (pair.base_start, pair.base_end, pair.other_start, pair.other_end)
    ratio = "undefined" if math.isnan(pair.rauc) else f"{pair.rauc:.3f}"
    most, least = ("<= ", ">= ") if pair.at_once else ("", "")
    never = "undefined" if math.isnan(pair.rauc) else "never"
    match = never if pair.match is None else f"{most}{pair.match:.1f}"
    saved = "" if pair.reduction is None else f"{least}{pair.reduction:.0%}"
    return (name, *(f"{score:#.4g}" for score in scores), ratio, match, saved)


def _over(found: Efficiency, name: str, form: str) -> str:
    """Mean and standard deviation over the pairs, and of how many if some have none."""
    mean, std, n = found.over_seeds(name)
    if mean is None:
        return ""
    text = format(mean, form) + ("" if std is None else f" ± {format(std, form)}")
    if any(pair.at_once for pair in found.pairs):
        text = {"match": "<= ", "reduction": ">= "}.get(name, "") + text
    return text if n == len(found.pairs) else f"{text} ({n} of {len(found.pairs)})"
