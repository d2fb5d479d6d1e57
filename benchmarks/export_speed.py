"""Measure exported models: each runtime, in float32 and 8 bits, beside torch, in one run.

    python benchmarks/export_speed.py --bf16 --out export_speed.json
    python benchmarks/export_speed.py --methods "evit(keep=0.7)" --batches 1 --rounds 3

The model is DeiT-S with random weights, as speed does not depend on them; 8 bits are fitted to
synthetic images. Every round times each variant once, in random order: the dense model in torch
twice (A/A), each method in torch, and all of them in each runtime. Exported models stay in --work,
where a second call finds them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

import foveate
from foveate import machine
from foveate.bench.images import natural_images
from foveate.bench.progress import progress_bar
from foveate.exports.infer import open_model
from foveate.measure import Results, frame
from foveate.measure.sheets import Sheet, show, terminal
from foveate.measure.table import pd, rows
from foveate.timing import AGAIN, DENSE, LEAST_ROUNDS, Timings, measure

METHODS = ("evit(keep=0.7)", "dynamicvit(keep=0.7)", "tokenmergence(keep=0.7)", "tome(r=13)")
RUNTIMES = {
    "onnxruntime fp32": ("onnx", False),
    "openvino fp32": ("openvino", False),
    "onnxruntime int8": ("onnx", True),
    "openvino int8": ("openvino", True),
}
BF16 = {"openvino bf16": "openvino fp32", "openvino int8, bf16": "openvino int8"}
TORCH = "torch fp32"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="deit_small_patch16_224", help="name of a timm model")
    add("--methods", nargs="+", default=list(METHODS), help="methods to export")
    add("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    add("--rounds", type=int, default=LEAST_ROUNDS, help="number of timed rounds")
    add("--threads", type=int, help="number of CPU threads (default: physical cores)")
    add("--work", type=Path, default=Path("runs/export_speed"), help="folder for exported models")
    add("--bf16", action="store_true", help="OpenVINO in bfloat16 too, for processors that have it")
    add("--only-export", action="store_true", help="export the models, but do not time them")
    add("--out", type=Path, help="JSON file for the result, with its table beside it")
    args = parser.parse_args()
    machine.tune_malloc("cpu", Path(__file__).name)
    threads = args.threads or machine.physical_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    runtimes = (*RUNTIMES, *(BF16 if args.bf16 else ()))
    vit = timm.create_model(args.model).eval().requires_grad_(False)
    models = {DENSE: vit, **{name: foveate.apply(vit, name).eval() for name in args.methods}}
    with progress_bar() as progress:
        for name, model in models.items():
            export(name, model, args.work, progress)
    if args.only_export:
        return
    results = Results(
        frame([]),
        {
            "command": machine.command(f"python benchmarks/{Path(__file__).name}"),
            "machine": machine.facts("cpu"),
            "settings": {
                "model": args.model,
                "weights": "random",
                "rounds": args.rounds,
                "runtimes": {n: machine.version_of(n) for n in ("onnxruntime", "openvino", "nncf")},
            },
        },
    )
    where = {"commit": machine.commit(), "machine": machine.name(machine.facts("cpu"))}
    for batch in args.batches:
        images = natural_images(batch, vit.patch_embed.img_size, 0)
        with progress_bar() as progress, torch.inference_mode():
            timings = measure(
                calls(models, runtimes, args.work, images, threads),
                rounds=args.rounds,
                warmup=3,
                sample_ms=20.0,
                device="cpu",
                settle=True,
                progress=partial(progress, f"batch {batch}"),
            )
        found = frame(judged(timings, list(models), runtimes, batch), **where)
        results.table = pd.concat([results.table, found], ignore_index=True)
        show(sheet(found, batch, args.rounds), terminal())
        if args.out is not None:
            results.save(args.out)


def place(work: Path, method: str, runtime: str) -> Path:
    """Return the folder of a variant."""
    short = "".join(c if c.isalnum() else "_" for c in f"{method} {runtime}")
    return work / short


def export(name: str, model: Any, work: Path, progress: Callable[[str, int, int], None]) -> None:
    """Export a model for every runtime in which --work does not have it yet."""
    size = model.patch_embed.img_size
    for runtime, (format, int8) in RUNTIMES.items():
        folder = place(work, name, runtime)
        if (folder / "README.md").exists():  # written last
            continue
        began = time.perf_counter()
        foveate.export(
            model,
            folder,
            format=format,
            int8=int8,
            calibrate=natural_images(32, size, 1) if int8 else None,
            progress=partial(_titled, progress, f"{name}, {runtime}"),
        )
        print(f"{name}, {runtime}: exported in {time.perf_counter() - began:.0f} s", flush=True)


def _titled(
    progress: Callable[[str, int, int], None], title: str, what: str, done: int, of: int
) -> None:
    progress(f"{title}: {what}", done, of)


def calls(
    models: dict[str, Any],
    runtimes: Sequence[str],
    work: Path,
    images: torch.Tensor,
    threads: int,
) -> dict[str, Callable[[], Any]]:
    """Return the calls that are timed, by runtime and method."""
    found: dict[str, Callable[[], Any]] = {AGAIN: lambda: models[DENSE](images)}
    pixels = images.numpy()
    for name, model in models.items():
        found[f"{TORCH}\n{name}"] = partial(model, images)
        for runtime in runtimes:
            folder = place(work, name, BF16.get(runtime, runtime))
            run = open_model(folder, threads, len(images), bf16=runtime in BF16)[0]
            found[f"{runtime}\n{name}"] = partial(run, pixels)
    return found


def judged(
    timings: Timings, names: list[str], runtimes: Sequence[str], batch: int
) -> list[dict[str, Any]]:
    """Return every ratio, and the times of every round."""
    dense = f"{TORCH}\n{DENSE}"
    spread = timings.ratio(AGAIN, dense).spread
    found = rows("speed", {"spread": spread}, run=TORCH, at=batch)
    for runtime in (TORCH, *runtimes):
        for name in names:
            key, where = f"{runtime}\n{name}", {"run": runtime, "at": batch}
            where["method"] = "" if name == DENSE else name
            times = timings.ratio(key, dense)
            own = timings.ratio(key, f"{runtime}\n{DENSE}")
            eager = timings.ratio(f"{TORCH}\n{name}", dense)
            values = {
                "ms": timings.ms(key).median,
                "times": times.median,
                "low": times.low,
                "high": times.high,
                "over_dense": own.median,
                "kept": own.median / eager.median,
            }
            found += rows("speed", values, **where)
            for turn, ms in enumerate(timings.samples[key]):
                found += rows("speed", {"round_ms": ms}, draw=turn, **where)
    return found


def sheet(found: pd.DataFrame, batch: int, rounds: int) -> Sheet:
    """Return the ratios of a batch size as a table for the terminal."""
    wide = found[found["draw"].isna()].pivot_table(
        index=["run", "method"], columns="metric", values="value", sort=False
    )
    lines = [
        {
            "runtime": run,
            "method": method or DENSE,
            "ms": f"{line['ms']:.1f}",
            "over torch, dense": f"{line['times']:.2f} [{line['low']:.2f}, {line['high']:.2f}]",
            "over the runtime's dense": f"{line['over_dense']:.2f}",
            "of torch's speed-up": f"{line['kept']:.2f}",
        }
        for (run, method), line in wide.iterrows()
    ]
    spread = wide["spread"].dropna().iloc[0]
    return Sheet(
        f"batch {batch}, {rounds} rounds, A/A spread {spread:.1%}",
        pd.DataFrame(lines),
        words=("runtime", "method"),
    )


if __name__ == "__main__":
    main()
