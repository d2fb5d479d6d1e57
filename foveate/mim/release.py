"""Open pre-training checkpoints that authors released, with decoder, head or projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.backbones import backbone_for
from foveate.convert import Settings, open_model
from foveate.convert.read import read
from foveate.mim.mae import Decoder
from foveate.mim.method import MaskedImageModel, make_method
from foveate.mim.weights import fill

__all__ = ["open_release"]

Tensors = Mapping[str, Tensor]


def open_release(
    path: Path, settings: Settings | None = None, options: Mapping[str, Any] | None = None
) -> MaskedImageModel:
    """Open a checkpoint of MAE, SimMIM, BootMAE or ConMIM: the method, its ViT and all weights.

    Args:
        path: the file.
        settings: for the ViT, as ``foveate.load`` takes them.
        options: of the method that tensors do not show: norm_pix, and decoder_heads where they are
            not 32 wide (MAE) or not as many as the encoder's (BootMAE).
    """
    settings = settings or Settings()
    # Wrappers' prefixes are taken off, that of SimMIM's encoder too.
    tensors = read(path, settings.weights).tensors
    name = next((name for mark, (name, _) in _KNOWN.items() if mark in tensors), None)
    if name is None or "mask_token" not in tensors:
        raise ValueError(
            f"{path} has no decoder: expected a checkpoint of MAE, SimMIM, BootMAE or ConMIM with "
            "all that was pre-trained, and without --pretraining an encoder alone will do"
        )
    vit = open_model(path, None, None, {}, settings).model
    seen, own = dict(_KNOWN.values())[name](tensors)
    if name == "bootmae":
        seen["decoder_heads"] = backbone_for(vit).spec.heads
    model = make_method(name, vit, {**seen, **(options or {})})
    for part, decoder in model.named_modules():
        # At another image size: they are no weights, but sines and cosines of the grid.
        key = f"{part}.pos_embed"
        if isinstance(decoder, Decoder) and own[key].shape != decoder.pos_embed.shape:
            own[key] = decoder.pos_embed
    fill(model, vit.state_dict(), own, path)
    return model.eval()


def _mae(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    own = {
        f"decoder.{key.removeprefix('decoder_')}": value
        for key, value in tensors.items()
        if key.startswith("decoder_")
    }
    depth = len({key.split(".")[1] for key in tensors if key.startswith("decoder_blocks.")})
    seen = {"decoder_width": len(tensors["decoder_embed.weight"]), "decoder_depth": depth}
    return seen, own | {"decoder.mask_token": tensors["mask_token"]}


def _simmim(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn its convolution and pixel shuffle into a linear layer with reordered outputs."""
    weight, bias = tensors["decoder.0.weight"][:, :, 0, 0], tensors["decoder.0.bias"]
    side = tensors["patch_embed.proj.weight"].shape[2]
    # Outputs are channel, row, column there, and row, column, channel here.
    order = torch.arange(len(weight)).view(-1, side, side).permute(1, 2, 0).flatten()
    return {}, {
        "mask_token": tensors["mask_token"],
        "head.weight": weight[order].contiguous(),
        "head.bias": bias[order].contiguous(),
    }


def _bootmae(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rename its two regressors, in which queries, keys and values are separate here."""
    own: dict[str, Tensor] = {}
    depth = 0
    for part, end in (("pixel", ""), ("feature", "_1")):
        for here, there in (("embed", "down"), ("norm", "decode_norm")):
            for kind in ("weight", "bias"):
                own[f"{part}.{here}.{kind}"] = tensors[f"{there}{end}.{kind}"]
        own[f"{part}.mask_token"] = tensors[f"mask_token{end}"]
        blocks = f"decode_blocks{end}."
        for key, value in tensors.items():
            if not key.startswith(blocks):
                continue
            number, name = key.removeprefix(blocks).split(".", 1)
            depth = max(depth, int(number) + 1)
            own |= _projections(f"{part}.blocks.{number}.", name, value)
    own["pixel.pos_embed"] = tensors["de_pos_embed"]
    own["feature.pos_embed"] = tensors["pos_embed"]  # of the encoder, and as wide
    # A transposed convolution has a bias for each channel.
    weight, bias = tensors["lm_head.proj.weight"], tensors["lm_head.proj.bias"]
    rows, columns = weight.shape[2:]
    own["pixel.pred.weight"] = weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
    own["pixel.pred.bias"] = bias.repeat(rows * columns)
    for kind in ("weight", "bias"):
        own[f"feature.pred.{kind}"] = tensors[f"lm_head_1.{kind}"]
    return {"decoder_width": len(tensors["down.weight"]), "decoder_depth": depth}, own


def _projections(place: str, name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a tensor of a regressor's block under our names."""
    layer, _, rest = name.partition(".")
    layer = {"c_attn": "cross"}.get(layer, layer)
    if rest in ("qkv.weight", "kv.weight"):
        parts = rest.removesuffix(".weight")
        split = [part.contiguous() for part in value.chunk(len(parts))]
        return {f"{place}{layer}.{p}.weight": v for p, v in zip(parts, split, strict=True)}
    if rest in ("q_bias", "v_bias"):
        rest = f"{rest[0]}.bias"
    return {f"{place}{layer}.{rest}": value.contiguous()}


def _conmim(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    own = {
        f"projector.{key.removeprefix('projectors.')}": value
        for key, value in tensors.items()
        if key.startswith("projectors.")
    }
    widths = [len(tensors[f"projectors.{layer}.weight"]) for layer in (0, 6)]
    seen = {"projector_width": widths[0], "projector_out": widths[1]}
    return seen, own | {"mask_token": tensors["mask_token"]}


# A key that tells whose a checkpoint is, the method, and what reads it: options, and tensors.
_KNOWN: dict[str, tuple[str, Callable[[Tensors], tuple[dict[str, Any], dict[str, Tensor]]]]] = {
    "decoder_embed.weight": ("mae", _mae),
    "decoder.0.weight": ("simmim", _simmim),
    "decode_norm_1.weight": ("bootmae", _bootmae),
    "projectors.0.weight": ("conmim", _conmim),
}
