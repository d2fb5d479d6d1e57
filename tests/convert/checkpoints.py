"""What tests of this folder share: small models' weights under the names of other code bases."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from contract.table import randomise, vit
from torch import Tensor, nn

import foveate
from foveate.backbones import LVViT
from foveate.core import ReducedViT

HEADS = 3  # of every small model, which are 48 wide

Weights = dict[str, Tensor]


def write(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def renamed(state: Weights, *rules: tuple[str, str]) -> Weights:
    new = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        new[key] = value
    return new


def reduced(method: str, model: nn.Module | None = None) -> ReducedViT:
    model = foveate.apply(randomise(vit()) if model is None else model, method, check=False)
    randomise(model.reducer, seed=1)
    return model.eval()


def parts(model: ReducedViT) -> Weights:
    """Tensors of a reduced model, the backbone's without a prefix."""
    return {
        key.removeprefix("vit."): value
        for key, value in model.state_dict().items()
        if key.startswith(("vit.", "reducer."))
    }


def as_dynamicvit(model: ReducedViT) -> Weights:
    """Halves of a predictor's layers in one, as released."""
    state = parts(model)
    for stage in range(len(model.reducer.predictors)):
        ours, theirs = f"reducer.predictors.{stage}.", f"score_predictor.{stage}."
        for kind in ("weight", "bias"):
            halves = [state.pop(f"{ours}{half}_in.{kind}") for half in ("local", "global")]
            state[f"{theirs}in_conv.1.{kind}"] = torch.cat(halves)
        halves = [state.pop(f"{ours}{half}_out.weight") for half in ("local", "global")]
        state[f"{theirs}out_conv.0.weight"] = torch.cat(halves, 1)
    return renamed(
        state,
        (r"^reducer\.predictors\.(\d+)\.norm\.", r"score_predictor.\1.in_conv.0."),
        (r"^reducer\.predictors\.(\d+)\.global_out\.bias", r"score_predictor.\1.out_conv.0.bias"),
        (r"^reducer\.predictors\.(\d+)\.out\.1\.", r"score_predictor.\1.out_conv.2."),
        (r"^reducer\.predictors\.(\d+)\.out\.3\.", r"score_predictor.\1.out_conv.4."),
    )


def as_svit(model: ReducedViT) -> Weights:
    return renamed(
        parts(model),
        (r"^reducer\.gates\.(\d+)\.0\.", r"selective_modules.\1.norm."),
        (r"^reducer\.gates\.(\d+)\.1\.", r"selective_modules.\1.mlp.fc1."),
        (r"^reducer\.gates\.(\d+)\.3\.", r"selective_modules.\1.mlp.fc2."),
        (r"^(blocks\.\d+)\.attn\.qkv\.", r"\1.TransformerEncoderLayer.self_attn.in_proj_"),
        (r"^(blocks\.\d+)\.attn\.proj\.", r"\1.TransformerEncoderLayer.self_attn.out_proj."),
        (r"^(blocks\.\d+)\.mlp\.fc([12])\.", r"\1.TransformerEncoderLayer.linear\2."),
        (r"^(blocks\.\d+)\.norm", r"\1.TransformerEncoderLayer.norm"),
    )


def as_evovit(model: ReducedViT) -> Weights:
    state: Weights = {}
    for key, value in parts(model).items():
        block = re.match(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", key)
        if block is None:
            state[key] = value
            continue
        width = len(value) // 3
        state[f"qks.{block[1]}.qk.{block[2]}"] = value[: 2 * width]
        state[f"vs.{block[1]}.v.{block[2]}"] = value[2 * width :]
    state |= {"head_cls.weight": torch.ones(3, 4), "norm_cls.bias": torch.ones(4)}
    return renamed(
        state,
        (r"^fc_norm\.", "norm."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"projs.\1."),
        (r"^blocks\.(\d+)\.norm1\.", r"norms.\1."),
    )


def mae() -> Weights:
    """A pre-training checkpoint: no head, a decoder, a mask token."""
    state = dict(randomise(vit(num_classes=0)).state_dict())
    decoder = {"decoder_embed.weight": 0, "decoder_blocks.0.norm1.bias": 0, "mask_token": 0}
    return state | {key: torch.ones(1, 1, 8) for key in decoder}


def lvvit(**options: object) -> nn.Module:
    small = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    return randomise(LVViT(**{**small, **options})).eval()
