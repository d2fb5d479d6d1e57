"""Images that an export needs: to fit 8 bits to, and to compare on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.bench.images import images_for, read_images
from foveate.data import ImageFiles, Inputs, fashion_mnist_mini, normalise
from foveate.dense import Hosting
from foveate.exports.graph import Graph

__all__ = ["Paths", "for_calibration", "for_check"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_CALIBRATION, _CHECKED = 128, 64  # at most
_SEED = 4321


def for_calibration(model: nn.Module, given: Tensor | Paths | None) -> np.ndarray:
    """Return the images that 8 bits are fitted to."""
    if given is not None:
        return _read(model, given, _CALIBRATION)[0].numpy()
    if isinstance(model, Hosting) or not _is_fashion(model):
        raise ValueError(
            "int8 is fitted to images like those that the model will see: give some (calibrate, "
            "--calibrate PATH)"
        )
    return normalise(fashion_mnist_mini("train").images[:_CALIBRATION]).numpy()


def for_check(model: nn.Module, graph: Graph, given: Tensor | Paths | None) -> tuple[Tensor, str]:
    """Return the images to compare on, and where they are from."""
    if given is not None:
        return _read(model, given, _CHECKED)
    made = images_for(graph.channels, graph.size, _CHECKED, _SEED, None)
    return made.take(_CHECKED), made.source


def _is_fashion(model: nn.Module) -> bool:
    inputs = Inputs.of(model)
    return inputs.channels == 1 and inputs.size == (28, 28)


def _read(model: nn.Module, given: Tensor | Paths, most: int) -> tuple[Tensor, str]:
    """Read images as the model takes them: prepared as in evaluation."""
    if isinstance(given, Tensor):
        _check_pixels(model, given)
        return given[:most].detach().float().cpu(), "given by the caller"
    if isinstance(model, Hosting):
        found = read_images(
            model, [given] if isinstance(given, (str, os.PathLike)) else given, most
        )
        prepared: Any = model.prepared([*found.pixels])
        return torch.as_tensor(getattr(prepared, "tensors", prepared)), "from files"
    inputs = Inputs.of(model)
    transform = inputs.transform()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (inputs.mean, inputs.std))
    pixels = [
        transform({"image": image})["image"].as_subclass(Tensor).float() / 255
        for _, image in islice(ImageFiles(given), most)
    ]
    return (torch.stack(pixels) - mean) / std, "from files"


def _check_pixels(model: nn.Module, given: Tensor) -> None:
    if isinstance(model, Hosting):
        return
    inputs = Inputs.of(model)
    shape = (inputs.channels, *inputs.size)
    if given.ndim != 4 or tuple(given.shape[1:]) != shape or not len(given):
        raise ValueError(f"images must be [N, {', '.join(map(str, shape))}], got {[*given.shape]}")
