"""Turn an image into a model's input, and find the part of the image that its patches cover."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import constants, resolve_model_data_config
from torch import Tensor, nn

from foveate.backbones import backbone_of
from foveate.core import Backbone
from foveate.core.schedule import check_choice

__all__ = ["FITS", "Preprocessing", "Prepared"]

FITS = ("stretch", "crop", "aspect")
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
_CLIP = (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD)
# What the image processors of transformers do for each kind of model unless a folder says else.
_BY_TYPE = {"deit": _IMAGENET, "dinov2": _IMAGENET, "dinov2_with_registers": _IMAGENET}
_BY_TYPE |= {"clip": _CLIP, "clip_vision_model": _CLIP}


@dataclass(frozen=True)
class Prepared:
    """An image, prepared for a model.

    Attributes:
        tensor: ``[channels, H, W]``.
        box: left, top, right and bottom of what it shows, in pixels of the image.
    """

    tensor: Tensor
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input.

    Attributes:
        grid: patch rows and columns of the model's own size.
        patch: patch height and width in pixels.
        mean, std: of each channel; their number is that of the channels.
        fit: "stretch" shows the whole image at the model's own size, whatever its shape, so that
            token counts are those that ``describe`` prints; "crop" the middle of it in the
            model's shape; "aspect" the whole image in its own shape, with about as many patches.
    """

    grid: tuple[int, int]
    patch: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "stretch"

    def __post_init__(self) -> None:
        check_choice("fit", self.fit, FITS)
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean and std need one value each for 1 or 3 channels, got {self.mean!r} and "
                f"{self.std!r}"
            )

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        fit: str = "stretch",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Preprocessing:
        """Read the preprocessing from a model.

        Args:
            model: a plain model or one from ``foveate.apply``.
            fit: see the class.
            mean: instead of what the model's configuration says.
            std: instead of what the model's configuration says.
        """
        backbone = backbone_of(model)
        if backbone.channels not in (1, 3):
            raise ValueError(
                f"the model takes images of {backbone.channels} channels; pictures have 1 or 3"
            )
        known = _normalisation(backbone)
        spec = backbone.spec
        return cls(spec.grid, spec.patch, mean or known[0], std or known[1], fit)

    def __call__(self, image: Image.Image) -> Prepared:
        """Cut, resize and normalise an RGB image."""
        grid = self._grid(image) if self.fit == "aspect" else self.grid
        height, width = (n * p for n, p in zip(grid, self.patch, strict=True))
        box = self._box(image, width / height)
        grey = len(self.mean) == 1
        small = (image.convert("L") if grey else image).resize(
            (width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0
        )
        values = torch.from_numpy(np.array(small)).float().view(height, width, -1) / 255
        values = (values - torch.tensor(self.mean)) / torch.tensor(self.std)
        return Prepared(values.permute(2, 0, 1).contiguous(), box)

    def _grid(self, image: Image.Image) -> tuple[int, int]:
        """Return the grid in the image's shape with about as many patches as the model's own."""
        patches = self.grid[0] * self.grid[1]
        tall = (image.height / self.patch[0]) / (image.width / self.patch[1])
        rows = min(max(1, round((patches * tall) ** 0.5)), patches)
        return rows, max(1, round(patches / rows))

    def _box(self, image: Image.Image, shape: float) -> tuple[float, float, float, float]:
        if self.fit != "crop":
            return 0.0, 0.0, float(image.width), float(image.height)
        width = min(image.width, image.height * shape)
        height = width / shape
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return left, top, left + width, top + height


def _normalisation(backbone: Backbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and spread that the model was trained with, if it has them."""
    config: Any = getattr(backbone.model, "config", None)
    if hasattr(config, "model_type"):  # of transformers
        known = _said(backbone) or _of_folder(config)
        mean, std = known or _BY_TYPE.get(config.model_type, _HALF)
    elif backbone.channels == 1 and len(_given(backbone).get("mean", ())) != 1:
        return (0.5,), (0.5,)
    else:
        found = resolve_model_data_config(backbone.model)
        mean, std = found["mean"], found["std"]
    mean, std = mean[: backbone.channels], std[: backbone.channels]
    return tuple(map(float, mean)), tuple(map(float, std))


def _given(backbone: Backbone) -> dict[str, Any]:
    return getattr(backbone.model, "pretrained_cfg", None) or {}


def _said(backbone: Backbone) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the settings that training or a saved folder stored on the model."""
    given = _given(backbone)
    return (given["mean"], given["std"]) if {"mean", "std"} <= given.keys() else None


def _of_folder(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the settings beside the weights in the model's folder, if it has one."""
    folder = getattr(config, "_name_or_path", "")
    if not folder:
        return None
    try:
        text = (Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8")
        found = json.loads(text)
        return tuple(found["image_mean"]), tuple(found["image_std"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
