"""Check budgets in time: solve a rate for each, then time the model that it gives anew.

    python benchmarks/budget_speed.py --out budget_speed.json

The model is DeiT-S with random weights. A budget promises the time within 5 %; foveate.bench
measures the time that is reached in a separate interleaved run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import foveate
from foveate import machine
from foveate.bench import speed
from foveate.latency import TimeBudget
from foveate.measure import Results, frame
from foveate.measure.table import rows
from foveate.timing import DENSE, LEAST_ROUNDS

CASES = (
    *(("evit", "1.2x faster"), ("evit", "1.4x faster"), ("evit", "70 ms")),
    *(("tokenmergence", "1.3x faster"), ("dynamicvit", "1.3x faster"), ("tome", "1.1x faster")),
    *(("evit", "1.4x faster, batch 8"), ("tome", "1.5x faster, batch 8")),
    ("dynamicvit", "1.6x faster, batch 8"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="deit_small_patch16_224", help="name of a timm model")
    add("--rounds", type=int, default=LEAST_ROUNDS, help="number of timed rounds")
    add("--threads", type=int, help="number of CPU threads (default: physical cores)")
    add("--out", type=Path, help="JSON file for the result, with its table beside it")
    args = parser.parse_args()
    machine.tune_malloc("cpu", Path(__file__).name)
    torch.set_num_threads(args.threads or machine.physical_cores())
    vit = timm.create_model(args.model).eval()
    found, facts = [], machine.facts("cpu")
    for method, budget in CASES:
        wanted = TimeBudget.parse(budget)
        try:
            model = foveate.apply(vit, method, budget=budget)
        except ValueError as error:
            print(f"{method}, {budget}: {error}", flush=True)
            continue
        cell = speed(
            vit,
            {"it": model},
            batches=[wanted.batch],
            rounds=args.rounds,
            quick=args.rounds < LEAST_ROUNDS,
        ).cells[0]
        ratio, ms = cell.timings.ratio("it", DENSE), cell.timings.ms("it")
        reached = ratio.median if wanted.relative else ms.median
        off = reached / wanted.value - 1
        print(f"{model.reducer}, {budget}: {reached:.3g}, {off:+.1%} off; {ratio}", flush=True)
        values = {
            "promised": wanted.value,
            "reached": reached,
            "off": off,
            "times": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "ms": ms.median,
            "spread": cell.spread,
        }
        name = f"{model.reducer}, {budget}"
        found += rows("speed", values, run=args.model, method=name, at=wanted.batch)
        if args.out is None:
            continue
        where = {"commit": machine.commit(), "machine": machine.name(facts)}
        about = {
            "command": machine.command(f"python benchmarks/{Path(__file__).name}"),
            "machine": facts,
            "settings": {"model": args.model, "weights": "random", "rounds": args.rounds},
        }
        Results(frame(found, **where), about).save(args.out)


if __name__ == "__main__":
    main()
