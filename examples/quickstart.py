"""Take a stock timm ViT, run it with fewer tokens, and see what that does.

Nothing is downloaded: the weights are random, so the logits mean nothing and no accuracy is
shown. Token counts, multiply-adds and times are those of the real model.

    python examples/quickstart.py [--model deit_small_patch16_224] [--batch 8]
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

import foveate

METHODS = (
    "evit(keep=0.7)",
    "attention(keep=0.7)",
    "dynamicvit(keep=0.7)",
    "tokenmergence(keep=0.7)",
    "tome(r=13)",
    "tome(r=39, blocks=[3, 6, 9])",
)


def seconds(models: dict[str, torch.nn.Module], images: torch.Tensor, rounds: int) -> dict:
    """Times of all models, measured in turns so that a slow moment hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(images)
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - began)
    return times


@torch.inference_mode()
def main() -> None:
    """Describe one method closely and compare several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    vit = timm.create_model(options.model, pretrained=False).eval()
    images = torch.randn(options.batch, *vit.pretrained_cfg["input_size"])

    model = foveate.apply(vit, "evit", keep=0.7)  # vit itself stays as it is
    print(foveate.describe(model), "\n")

    trace = model.trace(images[:1])
    kept = [int(block.active().sum()) for block in trace.blocks]
    print("patches each block worked on:", *kept)
    grid = model.tokens(images[:1]).restore()
    print("features back on the grid:", list(grid.shape))
    print("unwrap gives the same object back:", foveate.unwrap(model) is vit, "\n")

    models = {"dense": vit}
    models |= {method: foveate.apply(vit, method, check=False) for method in METHODS}
    times = seconds(models, images, options.rounds)
    print(f"{options.model}, batch {options.batch}, {torch.get_num_threads()} threads:")
    for name, values in times.items():
        ratios = [d / t for d, t in zip(times["dense"], values, strict=True)]
        print(
            f"  {name:30s} {1000 * statistics.median(values):7.1f} ms   "
            f"{statistics.median(ratios):.2f}x dense"
        )
    print("medians of interleaved rounds; `make speed` measures with intervals and an oracle")


if __name__ == "__main__":
    main()
