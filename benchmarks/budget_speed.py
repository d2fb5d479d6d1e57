"""Check budgets in time: solve a rate for each, then time the model that it gives anew.

    python benchmarks/budget_speed.py --out budget_speed.json
    python benchmarks/budget_speed.py --exported --out budget_exported.json

The model is DeiT-S with random weights. A budget promises the time within 5 %; the time that is
reached is measured in a separate interleaved run. With --exported, models run in onnxruntime and
OpenVINO, in float32 and 8 bits, beside the dense model exported alike; 8 bits are fitted to
synthetic images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import foveate
from foveate import machine
from foveate.bench import speed
from foveate.bench.images import natural_images
from foveate.exports import Exported
from foveate.latency import TimeBudget, time_calls
from foveate.measure import Results, frame
from foveate.measure.table import rows
from foveate.timing import AGAIN, DENSE, LEAST_ROUNDS, Timings, measure

# A number is a share of the dense model's time, which becomes a budget in milliseconds.
CASES = (
    *(("evit", "1.2x faster"), ("evit", "1.4x faster"), ("evit", 0.8)),
    *(("tokenmergence", "1.3x faster"), ("dynamicvit", "1.3x faster"), ("tome", "1.1x faster")),
    *(("evit", "1.4x faster, batch 8"), ("tome", "1.5x faster, batch 8")),
    ("dynamicvit", "1.6x faster, batch 8"),
)


# Format, 8 bits or not, method, budget.
EXPORTED = (
    *(("openvino", False, "evit", "1.5x faster"), ("openvino", False, "tome", "1.2x faster")),
    *(("onnx", False, "evit", "1.5x faster"), ("onnx", False, "dynamicvit", "1.3x faster")),
    ("onnx", False, "tokenmergence", "1.4x faster, batch 8"),
    *(("openvino", True, "evit", "1.3x faster"), ("onnx", True, "evit", "1.3x faster")),
)
RUNTIMES = ("onnxruntime", "openvino", "nncf")
IT = "it"

Reached = tuple[str, TimeBudget, Timings]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="deit_small_patch16_224", help="name of a timm model")
    add("--exported", action="store_true", help="time exported models in their runtimes")
    add("--rounds", type=int, default=LEAST_ROUNDS, help="number of timed rounds")
    add("--threads", type=int, help="number of CPU threads (default: physical cores)")
    add("--out", type=Path, help="JSON file for the result, with its table beside it")
    args = parser.parse_args()
    machine.tune_malloc("cpu", Path(__file__).name)
    threads = args.threads or machine.physical_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vit = timm.create_model(args.model).eval().requires_grad_(False)
    facts, settings = machine.facts("cpu"), {"model": args.model, "weights": "random"}
    if args.exported:
        cases = in_runtimes(vit, args.rounds, threads)
        settings["runtimes"] = {name: machine.version_of(name) for name in RUNTIMES}
    else:
        cases = in_torch(vit, args.rounds)
    found: list[dict[str, Any]] = []
    for name, wanted, timings in cases:
        found += judged(name, wanted, timings, args.model)
        if args.out is None:
            continue
        where = {"commit": machine.commit(), "machine": machine.name(facts)}
        about = {
            "command": machine.command(f"python benchmarks/{Path(__file__).name}"),
            "machine": facts,
            "settings": {**settings, "rounds": args.rounds},
        }
        Results(frame(found, **where), about).save(args.out)


def in_torch(vit: nn.Module, rounds: int) -> Iterator[Reached]:
    """Solve and time the budgets of models in torch."""
    for method, budget in CASES:
        if isinstance(budget, float):
            budget = f"{budget * dense_ms(vit):.0f} ms"
        wanted = TimeBudget.parse(budget)
        try:
            model = foveate.apply(vit, method, budget=budget)
        except ValueError as error:
            print(f"{method}, {budget}: {error}", flush=True)
            continue
        quick = rounds < LEAST_ROUNDS
        cells = speed(vit, {IT: model}, batches=[wanted.batch], rounds=rounds, quick=quick).cells
        yield f"{model.reducer}, {budget}", wanted, cells[0].timings


def dense_ms(vit: nn.Module) -> float:
    """Time the dense model on one image."""
    images = natural_images(1, vit.patch_embed.img_size, 0)
    with torch.inference_mode():
        return time_calls({DENSE: partial(vit, images)}, "cpu").ms(DENSE).median


def in_runtimes(vit: nn.Module, rounds: int, threads: int) -> Iterator[Reached]:
    """Export models to budgets, and time them beside the dense model exported alike."""
    size = vit.patch_embed.img_size
    fitted = natural_images(32, size, 1)
    plain: dict[tuple[str, bool], Exported] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (format, int8, method, budget) in enumerate(EXPORTED):
            wanted = TimeBudget.parse(budget)
            how = {"format": format, "int8": int8, "calibrate": fitted, "threads": threads}
            if (format, int8) not in plain:
                place = Path(folder, f"dense{len(plain)}")
                plain[format, int8] = foveate.export(vit, place, **how)
            dense, model = plain[format, int8], foveate.apply(vit, method)
            try:
                found = foveate.export(model, Path(folder, f"{number}"), budget=budget, **how)
            except ValueError as error:
                print(f"{format}, {method}, {budget}: {error}", flush=True)
                continue
            pixels = natural_images(wanted.batch, size, 0).numpy()
            opened = {DENSE: dense, AGAIN: dense, IT: found}
            calls = {
                name: partial(one.open(threads, wanted.batch), pixels)
                for name, one in opened.items()
            }
            timings = measure(
                calls, rounds=rounds, warmup=3, sample_ms=20.0, device="cpu", settle=True
            )
            runtime = f"{found.about['runtime']}, {'8 bits' if int8 else 'fp32'}"
            yield f"{runtime}: {found.about['method']}, {budget}", wanted, timings


def judged(name: str, wanted: TimeBudget, timings: Timings, model: str) -> list[dict[str, Any]]:
    """Say how far a model is off its budget, and return that as rows."""
    ratio, ms = timings.ratio(IT, DENSE), timings.ms(IT)
    reached = ratio.median if wanted.relative else ms.median
    values = {
        "promised": wanted.value,
        "reached": reached,
        "off": reached / wanted.value - 1,
        "times": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "ms": ms.median,
        "spread": timings.ratio(AGAIN, DENSE).spread,
    }
    print(f"{name}: {reached:.3g}, {values['off']:+.1%} off; {ratio}", flush=True)
    return rows("speed", values, run=model, method=name, at=wanted.batch)


if __name__ == "__main__":
    main()
