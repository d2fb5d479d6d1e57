"""Check on a CUDA machine what CI cannot: modes, half precision, compilation, CUDA graphs.

    python benchmarks/cuda_check.py --out benchmarks/results/cuda_check.json

Every method runs on DeiT-S at 224 px with randomised weights. Each line gives the distance of the
logits of each way of running from the eager gathered (or packed) float32 ones, relative to their
size. Half precision may pick other tokens where scores nearly tie, so its distance is only
reported, and its values must be finite; all other ways must agree. Where scores nearly tie,
rounding alone may decide: "nudged" is the distance of the logits after images are changed by 1e-6
of their values, which happens on the CPU too, and twice that distance is allowed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import foveate

METHODS = (
    "attention",
    "dynamicvit",
    "evit",
    "evit(rest='drop')",
    "cropr",
    "evovit",
    "pitome",
    "random",
    "static",
    "structural",
    "svit(gate='topk')",
    "tokenmergence",
    "tome",
    "atm(threshold=0.9)",
    "ats",
    "spvit",
    "svit",
)
AGREE = 1e-3  # float32 on a GPU sums in another order in every kernel
NUDGE, _NUDGES = 1e-6, 8


def randomised(model: nn.Module) -> nn.Module:
    """Set weights with which attention and gates differ from image to image."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = torch.randn(p.shape, generator=noise)
            if p.ndim == 1:
                p.copy_(0.1 * value + (1.0 if name.endswith("weight") else 0.0))
            else:
                p.copy_(value * p[0].numel() ** -0.5)
    return model


def noise(like: Tensor, seed: int) -> Tensor:
    """Return random numbers of the same shape."""
    made = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return made.to(like.device)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest value; infinity if a value is not finite."""
    a, b = a.float(), b.float()
    if not torch.isfinite(a).all():
        return float("inf")
    return float((a - b).abs().max() / b.abs().max())


def check(method: str, device: torch.device, compiled: bool) -> dict[str, object]:
    """Return the distances of every way to run one method."""
    vit = randomised(timm.create_model("deit_small_patch16_224")).to(device).eval()
    model = foveate.apply(vit, method)
    randomised(model.reducer)
    model.to(device).eval()
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(device)
    result: dict[str, object] = {}
    with torch.no_grad():
        reference = model(images)
        modes = ["packed"] + (["gathered"] if model.reducer.fixed_count else [])
        modes += ["masked"] if model.reducer.maskable else []
        for mode in modes:
            model.mode = mode
            result[mode] = distance(model(images), reference)
        model.mode = "auto"
        result["nudged"] = max(
            distance(model(images * (1 + NUDGE * noise(images, seed))), reference)
            for seed in range(_NUDGES)
        )
        result["alone"] = distance(torch.cat([model(i[None]) for i in images]), reference)
        if compiled and model.reducer.fixed_count:
            for name, options in (
                ("compiled", {}),
                ("cuda graphs", {"mode": "reduce-overhead"}),
            ):
                torch._dynamo.reset()
                fast = torch.compile(model, fullgraph=True, dynamic=False, **options)
                for _ in range(3):
                    out = fast(images).clone()
                result[name] = distance(out, reference)
        torch._dynamo.reset()
        half = model.bfloat16()
        result["bf16"] = distance(half(images.bfloat16()), reference)
        if not model.reducer.fixed_count:
            half.mode = "packed"
            result["bf16 packed alone"] = distance(
                torch.cat([half(i[None].bfloat16()) for i in images]), reference
            )
    exact = [v for k, v in result.items() if not k.startswith("bf16") and k != "nudged"]
    allowed = max(AGREE, 2 * result["nudged"])  # type: ignore[operator]
    result["agrees"] = all(v <= allowed for v in exact) and result["bf16"] != float("inf")
    return result


def main() -> int:
    """Check all methods, and write the distances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "agree": AGREE,
        "methods": {},
    }
    failed = []
    for method in options.methods:
        began = time.perf_counter()
        result = check(method, device, not options.no_compile)
        report["methods"][method] = result  # type: ignore[index]
        shown = ", ".join(f"{k} {v:.0e}" for k, v in result.items() if k != "agrees")
        print(f"{'ok  ' if result['agrees'] else 'FAIL'} {method}: {shown}", end=" ")
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
        if not result["agrees"]:
            failed.append(method)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{len(options.methods) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
