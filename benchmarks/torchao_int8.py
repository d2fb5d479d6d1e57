"""Measure 8 bits in torch itself, by torchao and torch's compiler, beside eager torch and OpenVINO.

    pip install torchao
    python benchmarks/torchao_int8.py --out torchao_int8.json

The question is whether `foveate export --format pt2` should offer 8 bits. DeiT-S with random
weights at batch 1; every round times each variant once, in random order. "8 bits, graph" is the
captured graph as torchao leaves it, which is what a .pt2 file would hold; "8 bits, compiled" is the
same graph after torch.compile with frozen weights, which needs a C++ compiler where it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch._inductor.config as compiler
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import foveate
from foveate import machine
from foveate.bench.images import natural_images
from foveate.exports.infer import open_model
from foveate.timing import AGAIN, DENSE, LEAST_ROUNDS, measure

METHODS = (DENSE, "evit(keep=0.7)")


def in_8_bits(model: nn.Module, calibrate: Tensor, images: Tensor) -> nn.Module:
    """Return the graph of a model in 8 bits, captured again as a file would hold it."""
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    for image in calibrate.split(len(images)):
        prepared(image)
    converted = convert_pt2e(prepared)
    return torch.export.export(converted, (images,)).module()


def variants(name: str, vit: nn.Module, images: Tensor, work: Path) -> dict[str, Callable[[], Any]]:
    """Return the calls of a method that are timed, each run once."""
    model = vit if name == DENSE else foveate.apply(vit, name).eval()
    calibrate = natural_images(32, vit.patch_embed.img_size, 1)
    eight = in_8_bits(model, calibrate, images)
    foveate.export(model, work, format="openvino", int8=True, calibrate=calibrate, batch=1)
    openvino = open_model(work, torch.get_num_threads(), 1)[0]
    found = {
        f"{name}, fp32": partial(model, images),
        f"{name}, fp32, compiled": partial(torch.compile(model), images),
        f"{name}, 8 bits, graph": partial(eight, images),
        f"{name}, 8 bits, compiled": partial(torch.compile(eight), images),
        f"{name}, 8 bits, OpenVINO": partial(openvino, images.numpy()),
    }
    wanted = model(images)
    for title, call in found.items():
        began, answer = time.perf_counter(), call()
        seconds = time.perf_counter() - began
        logits = answer[0] if isinstance(answer, (list, tuple)) else answer
        same = torch.cosine_similarity(torch.as_tensor(logits), wanted).item()
        print(f"{title}: first call {seconds:.1f} s, cosine of logits {same:.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="number of timed rounds")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    machine.tune_malloc("cpu", Path(__file__).name)
    torch.set_num_threads(machine.physical_cores())
    torch.manual_seed(0)
    compiler.freezing = True  # weights are packed for 8-bit products only then
    vit = timm.create_model("deit_small_patch16_224").eval().requires_grad_(False)
    images = natural_images(1, vit.patch_embed.img_size, 0)
    base = f"{DENSE}, fp32"
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {AGAIN: lambda: vit(images)}
        for number, name in enumerate(METHODS):
            calls |= variants(name, vit, images, Path(work, str(number)))
        timings = measure(
            calls, rounds=args.rounds, warmup=3, sample_ms=20.0, device="cpu", settle=True
        )
    print(f"A/A spread {timings.ratio(AGAIN, base).spread:.1%}, {args.rounds} rounds")
    found = {}
    for title in calls:
        if title != AGAIN:
            ms, ratio = timings.ms(title).median, timings.ratio(title, base)
            print(
                f"{title:36} {ms:6.1f} ms  {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            )
            found[title] = {"ms": ms, "times": ratio.median, "low": ratio.low, "high": ratio.high}
    if args.out is not None:
        about = {
            "command": machine.command(f"python benchmarks/{Path(__file__).name}"),
            "commit": machine.commit(),
            "machine": machine.facts("cpu"),
            "torchao": version("torchao"),
            "rounds": args.rounds,
            "spread": timings.ratio(AGAIN, base).spread,
        }
        args.out.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
