"""Images for an export: how to prepare them, those to fit 8 bits to, those to compare on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.backbones import backbone_of
from foveate.bench.images import images_for
from foveate.data import ImageFiles, Inputs, fashion_mnist_mini, normalise
from foveate.dense import DenseModel, Hosting
from foveate.exports.infer import prepare

__all__ = ["SEED", "Paths", "for_calibration", "for_check", "preparation"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_CALIBRATION, _CHECKED = 128, 64  # the most images that are used, unless a call has more
_FASHION = (1, 28, 28)
SEED = 4321  # of the images that an export draws


def preparation(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Return how to prepare pictures; those for a dense model are stretched to its size."""
    found: dict[str, Any] = {"size": list(size)}
    if not isinstance(model, Hosting):
        inputs = Inputs.of(model)
        return {
            "channels": inputs.channels,
            **found,
            "mean": list(inputs.mean),
            "std": list(inputs.std),
            "crop_pct": inputs.crop_pct,
            "interpolation": inputs.interpolation,
        }
    channels = backbone_of(model.reduced).channels
    mean, std = [0.0] * channels, [1.0] * channels
    if isinstance(model, DenseModel):
        mean, std = list(model.transform.image_mean), list(model.transform.image_std)
    more = {"crop_pct": None, "interpolation": "bilinear"}
    return {"channels": channels, **found, "mean": mean, "std": std, **more}


def for_calibration(about: Mapping[str, Any], given: Tensor | Paths | None) -> np.ndarray:
    """Return the images that 8 bits are fitted to.

    Args:
        about: the result of ``preparation``.
        given: paths, or preprocessed images; None takes those that ship, if they fit the model.
    """
    if given is not None:
        return _read(about, given, _CALIBRATION)[0].numpy()
    if _shape(about) != _FASHION:
        raise ValueError(
            "int8 needs images like those that the model will see: give some (calibrate, "
            "--calibrate PATH)"
        )
    return normalise(fashion_mnist_mini("train").images[:_CALIBRATION]).numpy()


def for_check(
    about: Mapping[str, Any], given: Tensor | Paths | None, batch: int | None
) -> tuple[Tensor, str]:
    """Return images to compare on, and their source.

    Args:
        about: the result of ``preparation``.
        given: paths, or preprocessed images; None takes some that ship or are synthetic.
        batch: fixed number of images in a call, which have to be there, or None.
    """
    most = max(_CHECKED, batch or 1)
    if given is None:
        channels, *size = _shape(about)
        made = images_for(channels, (size[0], size[1]), most, SEED, None)
        return made.take(most), made.source
    images, source = _read(about, given, most)
    if batch is not None and len(images) < batch:
        raise ValueError(
            f"batches of {batch} need at least {batch} images to compare, got {len(images)}"
        )
    return images, source


def _shape(about: Mapping[str, Any]) -> tuple[int, ...]:
    return (about["channels"], *about["size"])


def _read(about: Mapping[str, Any], given: Tensor | Paths, most: int) -> tuple[Tensor, str]:
    """Read images, prepared as by the program beside the exported model."""
    if isinstance(given, Tensor):
        channels, *size = _shape(about)
        pixels = images_for(channels, (size[0], size[1]), 1, SEED, given).pixels
        return pixels[:most].detach().float().cpu(), "given by the caller"
    read = [prepare(image, about) for _, image in islice(ImageFiles(given), most)]
    return torch.from_numpy(np.stack(read)), "from files"
