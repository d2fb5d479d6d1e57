"""Measure the table of speed goals: every method against the dense model and its oracle.

    python benchmarks/speed.py                                # DeiT-S on this CPU, all cells
    python benchmarks/speed.py --device cuda --out speed.json
    python benchmarks/speed.py --compile --batches 32 --dtypes bf16
    python benchmarks/speed.py --profile evit --batches 1 --dtypes fp32

foveate.bench measures; this file has the goals, and the models and methods that they apply to.
Weights are random, as speed does not depend on them, except for methods with a count per image. For
those, foveate.bench sets gates to keep about their target share, and ats runs on a copy of the
model whose query and key rows are multiplied by 3 from a quarter of the depth on, because attention
of a random model is so flat that nearly every token would be kept.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import foveate
from foveate import machine
from foveate.bench import Result, explain, speed
from foveate.bench.progress import progress_bar
from foveate.measure import Results, frame
from foveate.measure.benchmark import cell_sheet, closing, figure, opening, table_of
from foveate.measure.sheets import show, terminal
from foveate.measure.style import save
from foveate.measure.table import pd, rows

MODELS = {
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "tiny": "tiny",
}


@dataclass(frozen=True)
class Method:
    """A row of the table: the method, and the name of its goals."""

    text: str
    bars: str


METHODS = {
    "evit": Method("evit", "pruning"),
    "evit-nofuse": Method("evit(rest='drop')", "pruning"),
    "attention": Method("attention", "pruning"),
    "dynamicvit": Method("dynamicvit", "pruning"),
    "tokenmergence": Method("tokenmergence", "extra"),
    "tome": Method("tome(r=13)", "tome"),
    "svit-topk": Method("svit(gate='topk')", "extra"),
    "ats": Method("ats", "varying"),
    "svit": Method("svit(gate='argmax')", "varying"),
    "spvit": Method("spvit(gate='argmax')", "varying"),
}

# Goals by batch size, or "compiled" at any batch size; other numbers are only reported.
GOALS: dict[str, dict[str, dict[str, float]]] = {
    "pruning": {"share": {"1": 0.95, "8": 0.95, "32": 0.95, "compiled": 0.95}},
    "extra": {"share": {"1": 0.93, "8": 0.92, "32": 0.92, "compiled": 0.93}},
    "tome": {
        "times": {"1": 1.25, "8": 1.10, "32": 1.20},
        "share": {"1": 0.85, "8": 0.82, "32": 0.82},
    },
    "varying": {"share": {"8": 0.90, "32": 0.93}},
}


def judged(result: Result) -> Results:
    """Return the table with goals; a goal also counts as reached within the A/A spread."""
    results = table_of(result)
    found: list[dict[str, Any]] = []
    for cell in result.cells:
        column = "compiled" if cell.compiled else str(cell.batch)
        for method in cell.methods if cell.model != "tiny" else ():
            goals = GOALS[METHODS[method].bars]
            values = {f"goal_{what}": bars.get(column) for what, bars in goals.items()}
            found += rows("speed", values, run=cell.setting, at=cell.batch, method=method)
    where = results.table[["commit", "machine"]].iloc[0].to_dict()
    results.table = pd.concat([results.table, frame(found, **where)], ignore_index=True)
    return results


def build_model(name: str) -> nn.Module:
    """Return a stock timm model with seeded random weights, for inference."""
    torch.manual_seed(0)
    if name == "tiny":
        model = timm.models.VisionTransformer(
            img_size=64, patch_size=8, embed_dim=64, depth=12, num_heads=2, num_classes=10
        )
    else:
        model = timm.create_model(MODELS[name], pretrained=False)
    return model.eval().requires_grad_(False)


def sharpened(vit: nn.Module, factor: float = 3.0) -> nn.Module:
    """Return a copy whose attention is less flat from a quarter of the depth on."""
    vit = copy.deepcopy(vit)
    for block in vit.blocks[len(vit.blocks) // 4 :]:
        qkv = block.attn.qkv
        rows = 2 * qkv.out_features // 3
        with torch.no_grad():
            qkv.weight[:rows] *= factor
            if qkv.bias is not None:
                qkv.bias[:rows] *= factor
    return vit


def method_for(key: str, vit: nn.Module) -> Any:
    """Return what foveate.bench takes: a method, or a separate model for ats."""
    text = METHODS[key].text
    return foveate.apply(sharpened(vit), text) if text == "ats" else text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", choices=tuple(MODELS), default="deit_s")
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--dtypes", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    add("--methods", choices=tuple(METHODS), nargs="+", default=list(METHODS))
    add("--rounds", type=int, default=30, help="rounds that count, at least 30")
    add("--warmup", type=int, default=3, help="rounds before them, which do not count")
    add(
        "--sample-ms",
        type=float,
        default=20.0,
        help="least milliseconds of one sample; a shorter call is repeated",
    )
    add("--compile", action="store_true", help="run compiled instead of eagerly; fixed counts only")
    add("--compile-mode", default="default", help="mode of torch.compile, such as reduce-overhead")
    add("--threads", type=int, help="number of CPU threads (default: physical cores)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file, with a table beside it, rewritten after every cell")
    add("--plot", type=Path, help="file for the result as a picture")
    add("--profile", choices=tuple(METHODS), metavar="METHOD", help="explain one method instead")
    add("--quick", action="store_true", help="smoke test: tiny model, batch 1 and 2, 3 rounds")
    args = parser.parse_args()
    if args.quick:
        args.model, args.batches, args.rounds, args.warmup = "tiny", [1, 2], 3, 1
        args.dtypes, args.sample_ms = ["fp32"], 0.0
    return args


def main() -> None:
    args = arguments()
    machine.tune_malloc(args.device, "speed.py")
    torch.set_num_threads(args.threads or machine.physical_cores())
    vit = build_model(args.model)
    if args.profile:
        print(
            explain(
                vit,
                method_for(args.profile, vit),
                batch=args.batches[0],
                dtype=args.dtypes[0],
                device=args.device,
                seed=args.seed,
            )
        )
        return
    console = terminal(150)

    def finished(result: Result) -> None:
        results = judged(result)
        if args.out is not None:
            results.save(args.out)
        if len(result.cells) == 1:
            print(*opening(results), sep="\n")
        show(cell_sheet(results), console)

    with progress_bar() as progress:
        result = speed(
            vit,
            {key: method_for(key, vit) for key in args.methods},
            batches=args.batches,
            dtypes=args.dtypes,
            rounds=args.rounds,
            warmup=args.warmup,
            sample_ms=args.sample_ms,
            device=args.device,
            compile=args.compile,
            compile_mode=args.compile_mode,
            seed=args.seed,
            name=args.model,
            command=machine.command("python benchmarks/speed.py"),
            notes={"weights": "random; ats: query and key rows x3 from a quarter of the depth on"},
            quick=args.quick,
            progress=progress,
            finished=finished,
        )
    results = judged(result)
    print(*closing(results), sep="\n")
    if args.plot is not None:
        save(figure(results), args.plot)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"speed.py: {error}") from error
