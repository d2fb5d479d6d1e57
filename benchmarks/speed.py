"""Measure the table of speed goals: every method against the dense model and its oracle.

    python benchmarks/speed.py                                # DeiT-S on this CPU, all cells
    python benchmarks/speed.py --device cuda --out speed.json
    python benchmarks/speed.py --compile --batches 32 --dtypes bf16
    python benchmarks/speed.py --profile evit --batches 1 --dtypes fp32

Each cell (batch x dtype) is one interleaved run: in every round each variant is timed once, in
random order. Ratios are taken round by round. The dense model runs twice under two names; how far
their ratio strays from 1 is what counts as noise. The oracle of a method has the same token counts
by slicing, without scoring; for methods whose images differ in count it is packed.
"""

from __future__ import annotations

import argparse
import gc
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speedlib import machine, profiling, report
from speedlib.oracle import Counts, oracle_for
from speedlib.report import AGAIN, DENSE, Cell
from speedlib.timing import measure, peak_memory
from speedlib.variants import (
    METHODS,
    MODELS,
    build_model,
    natural_images,
    reduced_model,
    sharpen,
)
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", choices=tuple(MODELS), default="deit_s")
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--dtypes", choices=tuple(DTYPES), nargs="+", default=list(DTYPES))
    add("--methods", choices=tuple(METHODS), nargs="+", default=list(METHODS))
    add("--rounds", type=int, default=30, help="rounds that count; at least 30 for a result")
    add("--warmup", type=int, default=3, help="rounds before them that do not")
    add("--sample-ms", type=float, default=20.0, help="least time of one sample, by repeats")
    add("--compile", action="store_true", help="compiled instead of eager; fixed counts only")
    add("--compile-mode", default="default", help="of torch.compile, such as reduce-overhead")
    add("--threads", type=int, help="CPU threads; default: physical cores")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON with everything, written anew after every cell")
    add("--raw", action="store_true", help="every sample into the JSON")
    add("--commit", help="what to record where git cannot tell")
    add("--profile", choices=tuple(METHODS), metavar="METHOD", help="explain one method instead")
    add("--quick", action="store_true", help="smoke test: tiny model, batch 1 and 2, 3 rounds")
    args = parser.parse_args()
    if args.quick:
        args.model, args.batches, args.rounds, args.warmup = "tiny", [1, 2], 3, 1
        args.dtypes, args.sample_ms = ["fp32"], 0.0
    if args.rounds < 1 or args.warmup < 0 or min(args.batches) < 1:
        parser.error("rounds and batches must be at least 1, warmup at least 0")
    return args


# One cell ----------------------------------------------------------------------------------------


class Bench:
    """Models and calls of one dtype; cells differ in the batch."""

    def __init__(self, args: argparse.Namespace, dtype: str) -> None:
        self.args, self.dtype = args, dtype
        self.vit = build_model(args.model, DTYPES[dtype], args.device)
        self.side = self.vit.patch_embed.img_size[0]
        keys = [args.profile] if args.profile else args.methods
        self.keys = [key for key in keys if not (args.compile and METHODS[key].varies)]
        sharp = sharpen(self.vit) if "ats" in self.keys else None
        with torch.no_grad():
            self.models = {
                key: reduced_model(key, self.vit, sharp, self.side, args.seed) for key in self.keys
            }

    def cell(self, batch: int) -> dict[str, Any]:
        """Calls of all variants at one batch size, and what to know about them."""
        images = natural_images(batch, self.side, self.args.seed + 1000)
        images = images.to(self.args.device, DTYPES[self.dtype])
        calls = {name: self._call(self.vit, images) for name in (DENSE, AGAIN)}
        oracles: dict[str, str] = {}
        facts: dict[str, dict[str, Any]] = {}
        known: dict[tuple[Any, ...], str] = {}
        for key, model in self.models.items():
            trace = model.trace(images)
            counts = Counts.of(trace)
            oracle = oracle_for(model, trace)
            same = (type(oracle), id(model.vit), counts)
            if same not in known:  # methods with one schedule share the oracle
                known[same] = f"oracle of {key}"
                calls[known[same]] = self._call(oracle, images)
            calls[key] = self._call(model, images)
            oracles[key] = known[same]
            facts[key] = {
                "tokens": counts.summary(),
                "acting_blocks": len(model.reducer.acts),
                "depth": model.backbone.spec.depth,
            }
        return {"calls": calls, "oracles": oracles, "facts": facts}

    def _call(self, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        if not self.args.compile:
            return lambda: model(images)

        def run() -> Tensor:
            return model(images)

        # A code object of its own for each variant, so that none of them waits for the guards
        # of the others.
        fresh = types.FunctionType(
            run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
        )
        return torch.compile(fresh, fullgraph=True, dynamic=False, mode=self.args.compile_mode)


def run_cell(bench: Bench, batch: int, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    cell = Cell(args.model, bench.dtype, batch, args.compile)
    parts = bench.cell(batch)
    calls = parts["calls"]
    start = time.perf_counter()
    for call in calls.values():  # compiles, and fills every cache
        call()
    if args.compile:
        print(f"  compiled {len(calls)} variants in {time.perf_counter() - start:.0f} s")
    timings = measure(
        calls,
        rounds=args.rounds,
        warmup=args.warmup,
        sample_ms=args.sample_ms,
        device=args.device,
        seed=args.seed,
        announce=lambda text: print(f"  {text}", flush=True),
    )
    memory = None
    if args.device == "cuda":
        memory = {name: peak_memory(call) for name, call in calls.items()}
    rows = report.rows_of(cell, timings, parts["oracles"], parts["facts"])
    text = report.text_of(cell, timings, rows, memory)
    return text, report.cell_json(cell, timings, rows, memory, args.raw)


def profile_method(args: argparse.Namespace) -> None:
    bench, batch = Bench(args, args.dtypes[0]), args.batches[0]
    parts = bench.cell(batch)
    calls, key = parts["calls"], args.profile
    oracle = calls[parts["oracles"][key]]
    print(f"{key} against its oracle: {args.model}, {bench.dtype}, batch {batch}, {args.device}\n")
    print(profiling.compare(calls[key], oracle, args.device), "\n")
    print(profiling.table(calls[key], args.device))


# All cells ---------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    machine.tune_malloc(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; use --device cpu")
    threads = args.threads or machine.physical_cores()
    torch.set_num_threads(threads)
    if args.compile:
        import torch._inductor.config as inductor

        # Constant weights, as deployed; on a CPU the linear layers are packed for it.
        inductor.freezing = args.device == "cpu"
    about = machine.facts(args.device, threads)
    print(
        f"torch {about['torch']}, timm {about['timm']}, python {about['python']}; "
        f"{about.get('gpu', about['cpu'])}, {threads} threads",
        flush=True,
    )
    # Freezing and inference tensors do not go together; without gradients both cost the same
    # once compiled.
    with torch.no_grad() if args.compile else torch.inference_mode():
        if args.profile:
            profile_method(args)
            return
        run_all(args, about)


def run_all(args: argparse.Namespace, about: dict[str, Any]) -> None:
    content: dict[str, Any] = {
        "what": "speed of foveate's methods against the dense model and their oracles",
        "command": machine.command(),
        "commit": machine.commit(args.commit),
        "machine": about,
        "settings": {
            "seed": args.seed,
            "warmup_rounds": args.warmup,
            "least_sample_ms": args.sample_ms,
            "gradients": "no_grad" if args.compile else "inference_mode",
            "compile_mode": args.compile_mode if args.compile else None,
            "freezing": args.compile and args.device == "cpu",
            "weights": "random; ats: query and key rows x3 from a quarter of the depth on; svit, "
            "spvit with a count per image: gates scaled and shifted to their target share",
            "images": "synthetic, 1/f noise with varying exponent, contrast and flat regions",
            "noise": "aa_spread: how far the 95 % interval of the dense model's A/A ratio reaches "
            "from 1; a bar missed by less is 'within A/A spread'",
            "share_of_oracle": "oracle time / method time, median over rounds",
        },
        "cells": [],
    }
    for dtype in args.dtypes:
        bench = Bench(args, dtype)
        for batch in args.batches:
            print(f"\n{args.model}, {dtype}, batch {batch}:", flush=True)
            text, found = run_cell(bench, batch, args)
            print(text, flush=True)
            content["cells"].append(found)
            if args.out is not None:
                report.write(args.out, content)
            if args.compile:
                torch._dynamo.reset()
            gc.collect()
        del bench
    print("\n" + report.legend(args.device == "cuda"))
    if args.rounds < 30:
        print(f"{args.rounds} rounds only: a trial, not a result.")


if __name__ == "__main__":
    main()
