"""How a model takes its images in evaluation, from its own configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from foveate.backbones import backbone_of, image_settings
from foveate.data.augment import Transform, eval_transform
from foveate.data.preprocess import Preprocessing

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """The preparation of images for a model.

    Attributes:
        size: height and width in pixels.
        channels: 1 or 3.
        mean, std: of each channel, of pixels in [0, 1].
        crop_pct: size of the crop divided by the length of the resized short side.
        interpolation: of the resizing.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str

    @classmethod
    def of(cls, model: nn.Module) -> Inputs:
        """Read the preparation from a model, plain or from ``foveate.apply``."""
        backbone = backbone_of(model)
        known = Preprocessing.of(model)
        (rows, columns), (height, width) = backbone.spec.grid, backbone.spec.patch
        config: Any = getattr(backbone.model, "config", None)
        if hasattr(config, "model_type"):  # of transformers
            # Without a word of its folder the short side is resized to the size, as most image
            # processors of transformers do with square images.
            stated = image_settings(backbone.model)
            crop_pct = float(stated.get("crop_pct", 1.0))
            interpolation = str(stated.get("interpolation", "bicubic"))
        else:
            found = resolve_model_data_config(backbone.model)
            crop_pct, interpolation = float(found["crop_pct"]), str(found["interpolation"])
        return cls(
            size=(rows * height, columns * width),
            channels=backbone.channels,
            mean=known.mean,
            std=known.std,
            crop_pct=crop_pct,
            interpolation=interpolation,
        )

    def transform(self) -> Transform:
        """Return the transform of samples into such images, before they are normalised."""
        return eval_transform(self.size, self.channels, self.crop_pct, self.interpolation)

    def batch(self, images: Iterable[Image.Image], like: Tensor) -> Tensor:
        """Prepare RGB images as a batch, ``[B, channels, H, W]``.

        Args:
            images: of any sizes.
            like: a tensor whose device and type the batch gets.
        """
        transform = self.transform()
        mean, std = (
            torch.tensor(values, device=like.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        pixels = torch.stack([transform({"image": image})["image"] for image in images])
        return ((pixels.as_subclass(Tensor).to(like.device).float() / 255 - mean) / std).to(like)

    def box(self, image: Image.Image) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of what the model sees of an image, in pixels."""
        if image.size == self.size[::-1]:
            return 0.0, 0.0, float(image.width), float(image.height)
        sides = (image.height, image.width)
        factor = max(
            int(n / self.crop_pct) / side for n, side in zip(self.size, sides, strict=True)
        )
        height, width = (n / factor for n in self.size)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return left, top, left + width, top + height
