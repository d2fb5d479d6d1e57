"""Checkpoints of pre-training that authors released: MAE with its decoder, SimMIM with its head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.convert import Settings, open_model
from foveate.convert.read import read
from foveate.mim.mae import Mae
from foveate.mim.method import MaskedImageModel, make_method
from foveate.mim.weights import fill

__all__ = ["open_release"]

_DECODER, _HEAD = "decoder_embed.weight", "decoder.0.weight"


def open_release(
    path: Path, settings: Settings | None = None, options: Mapping[str, Any] | None = None
) -> MaskedImageModel:
    """The method, its ViT and all weights of a checkpoint of MAE or SimMIM.

    Args:
        path: the file.
        settings: for the ViT, as ``foveate.load`` takes them.
        options: of the method that tensors do not show: norm_pix, and decoder_heads where they are
            not 32 wide.
    """
    settings, options = settings or Settings(), dict(options or {})
    # Wrappers' prefixes are taken off, that of SimMIM's encoder too.
    tensors = read(path, settings.weights).tensors
    if _DECODER in tensors:
        name, own = "mae", _mae(tensors)
        width = tensors[_DECODER].shape[0]
        depth = len({key.split(".")[1] for key in tensors if key.startswith("decoder_blocks.")})
        options = {"decoder_width": width, "decoder_depth": depth, **options}
    elif _HEAD in tensors and "mask_token" in tensors:
        name, own = "simmim", _simmim(tensors)
    else:
        raise ValueError(
            f"{path} has no decoder: expected a checkpoint of MAE or SimMIM with all that was "
            "pre-trained, and without --pretraining an encoder alone will do"
        )
    vit = open_model(path, None, None, {}, settings).model
    model = make_method(name, vit, options)
    if isinstance(model, Mae) and own["decoder.pos_embed"].shape != model.decoder.pos_embed.shape:
        # At another image size: they are no weights, but sines and cosines of the grid.
        own["decoder.pos_embed"] = model.decoder.pos_embed
    fill(model, vit.state_dict(), own, path)
    return model.eval()


def _mae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {
        f"decoder.{key.removeprefix('decoder_')}": value
        for key, value in tensors.items()
        if key.startswith("decoder_")
    }
    return own | {"decoder.mask_token": tensors["mask_token"]}


def _simmim(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its convolution and pixel shuffle are a linear layer whose outputs stand in another order."""
    weight, bias = tensors[_HEAD][:, :, 0, 0], tensors["decoder.0.bias"]
    side = tensors["patch_embed.proj.weight"].shape[2]
    # Outputs are channel, row, column there, and row, column, channel here.
    order = torch.arange(len(weight)).view(-1, side, side).permute(1, 2, 0).flatten()
    return {
        "mask_token": tensors["mask_token"],
        "head.weight": weight[order].contiguous(),
        "head.bias": bias[order].contiguous(),
    }
