"""Count how often a model is compiled for several batch sizes, against the stock model.

    python benchmarks/compilations.py --out benchmarks/results/compilations.json

Models have the blocks, prefix tokens and pooling of their family and four blocks of 48 channels:
how often a graph is compiled does not depend on their size. Each batch size must answer as eager.
Methods whose count depends on the image run packed, where each batch has its own lengths, so they
are not in the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch._dynamo.testing
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import foveate

METHODS = (
    *("attention", "cropr(r=6)", "dynamicvit", "evit", "evit(rest='drop')", "evovit", "pitome"),
    *("random", "spvit(gate='topk')", "static", "structural", "svit(gate='topk')"),
    *("tokenmergence", "tome(r=5)"),
)


def _small(cls: type[nn.Module], **options: object) -> nn.Module:
    base = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    return cls(**{**base, **options}).eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: _small(VisionTransformer),
    "dinov2": lambda: _small(
        VisionTransformer, reg_tokens=4, no_embed_class=True, init_values=1e-5
    ),
    "siglip": lambda: _small(VisionTransformer, class_token=False, global_pool="map"),
    "dinov3": lambda: _small(
        Eva,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        num_reg_tokens=4,
        init_values=1e-5,
        dynamic_img_size=True,
    ),
}


def compilations(model: nn.Module, sizes: list[int]) -> int:
    """Compile a model whole, run every batch size, and say how often it was compiled."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(size, 3, 48, 48, generator=torch.Generator().manual_seed(size))
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    return counter.frame_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: dict[str, dict[str, int | str]] = {}
    for method in ("stock", *args.methods):
        rows[method] = {}
        for family, make in FAMILIES.items():
            model = make()
            try:
                if method != "stock":
                    model = foveate.apply(model, method, check=False).eval()
                rows[method][family] = compilations(model, args.batches)
            except ValueError as reason:  # the method does not take this family
                rows[method][family] = str(reason)
        print(method, rows[method], flush=True)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "batches": args.batches,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "compilations": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
