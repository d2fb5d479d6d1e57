"""Transforms of torchvision (v2) that prepare images for training and for evaluation.

A transform takes a sample, a dictionary with an "image" and what belongs to it, and gives another.
Labels pass through. Boxes and masks that are tv_tensors follow the image, except for ``auto``,
which changes only images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from foveate.core.schedule import check_choice
from foveate.data.images import to_rgb

__all__ = [
    "CROPS",
    "INTERPOLATIONS",
    "Augment",
    "Picture",
    "Transform",
    "eval_transform",
    "pixels",
    "train_transform",
]

CROPS = ("resized", "pad", "none")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")  # Pillow turns images with no other

# From a sample to a sample. Those of v2 are; so is any function of a dictionary.
Transform = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(kw_only=True)
class Augment:
    """What is done to training images.

    Normalisation, erasing and mixing are not part of it, because they are faster on the device.

    Attributes:
        crop: "resized" cuts a part of random area and shape and resizes it; "pad" adds ``pad``
            black pixels on every side and cuts the size out of that; "none" takes the middle.
        scale: smallest and largest area of a resized crop, as shares of the image.
        ratio: smallest and largest width / height of a resized crop.
        pad: number of pixels that are added on every side where ``crop`` is "pad".
        flip: probability that the image is mirrored.
        colour: strength of the jitter of brightness, contrast and saturation; 0 for none.
        auto: a policy of timm, such as "rand-m9-mstd0.5-inc1", "3a" or "original"; None for none.
        interpolation: how images are resized and turned: "nearest", "bilinear" or "bicubic".
    """

    crop: str = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    flip: float = 0.5
    colour: float = 0.0
    auto: str | None = None
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        check_choice("crop", self.crop, CROPS)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        self.scale = _check_range("scale", self.scale, most=1.0)
        self.ratio = _check_range("ratio", self.ratio)
        if isinstance(self.pad, bool) or not isinstance(self.pad, int) or self.pad < 0:
            raise ValueError(f"pad must be a whole number of pixels from 0, got {self.pad!r}")
        if not _is_number(self.flip) or not 0 <= self.flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], got {self.flip!r}")
        if not _is_number(self.colour) or not 0 <= self.colour < float("inf"):
            raise ValueError(f"colour must be 0 or more, got {self.colour!r}")
        if self.auto is not None:
            _policy(self.auto, 3, (32, 32), self.interpolation)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_range(name: str, given: Any, most: float = float("inf")) -> tuple[float, float]:
    """Return two ascending numbers as a tuple; YAML gives lists."""
    pair = tuple(given) if isinstance(given, (list, tuple)) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 < pair[0] <= pair[1] <= most:
        end = f" up to {most:g}" if most < float("inf") else ""
        raise ValueError(f"{name} must be two ascending numbers above 0{end}, got {given!r}")
    return pair


def _policy(auto: str, channels: int, size: tuple[int, int], interpolation: str) -> Any:
    """Build a policy with timm."""
    mean = IMAGENET_DEFAULT_MEAN if channels == 3 else (0.5,)
    try:
        if not auto:
            raise ValueError("it is empty")
        found = create_transform(
            size,
            is_training=True,
            auto_augment=auto,
            interpolation=interpolation,
            mean=mean,
            separate=True,
            color_jitter=0.0,
        )[1].transforms
    except Exception as error:  # asserts, KeyErrors and more, whatever the parser trips over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f'auto must be a policy of timm such as "rand-m9-mstd0.5-inc1", got {auto!r}: {reason}'
        ) from error
    policy = found[0]
    chains = getattr(policy, "policy", None) or [policy.ops]
    for operation in (each for chain in chains for each in chain):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits; at their strongest, timm's policies ask for none, which gives black.

    Older versions of Pillow return black; newer ones raise, which would end a run after some
    hundred images.
    """
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))


def train_transform(augment: Augment, size: tuple[int, int], channels: int) -> Transform:
    """Build the transform of training images into tensors ``[channels, *size]`` uint8.

    It draws from the global generators, which a loader seeds for each image. Images that are
    tensors already are only checked, because their data set has augmented them.
    """
    _check_output(size, channels)
    a, how = augment, InterpolationMode(augment.interpolation)
    steps: list[Any] = [Picture(channels)]
    if a.crop == "resized":
        steps.append(v2.RandomResizedCrop(size, a.scale, a.ratio, how, antialias=True))
    else:
        steps.append(_Fit(size, 1.0, how))
        if a.crop == "pad" and a.pad:
            steps.append(v2.RandomCrop(size, padding=a.pad))
    if a.flip:
        steps.append(v2.RandomHorizontalFlip(a.flip))
    if a.auto is not None:
        policy = _policy(a.auto, channels, size, a.interpolation)
        steps.append(v2.Lambda(policy, Image.Image))
    if a.colour:
        steps.append(v2.ColorJitter(a.colour, a.colour, a.colour))
    return _UnlessDone(v2.Compose([*steps, pixels]), (channels, *size))


def eval_transform(
    size: tuple[int, int],
    channels: int,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
) -> Transform:
    """Build the transform that resizes the short side to ``size / crop_pct`` and crops the middle.

    Images that have the size already stay as they are, and so do tensors.
    """
    _check_output(size, channels)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if not _is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct!r}")
    fit = _Fit(size, crop_pct, InterpolationMode(interpolation))
    return _UnlessDone(v2.Compose([Picture(channels), fit, pixels]), (channels, *size))


def _check_output(size: tuple[int, int], channels: int) -> None:
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"size must be a height and a width in pixels, got {size!r}")
    check_choice("channels", channels, (1, 3))


@dataclass(frozen=True)
class Picture:
    """Turn an image of any form into a grey or RGB image of Pillow."""

    channels: int

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"]
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        return {**sample, "image": image.convert("L") if self.channels == 1 else to_rgb(image)}


def pixels(sample: dict[str, Any]) -> dict[str, Any]:
    """Turn the image into a tensor; v2's own step takes ten times as long on small images."""
    values = np.array(sample["image"])
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return {**sample, "image": tv_tensors.Image(torch.from_numpy(values).contiguous())}


@dataclass(frozen=True)
class _UnlessDone:
    """Prepare pictures, and check tensors that a data set's own transform has prepared."""

    steps: v2.Compose
    shape: tuple[int, int, int]

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"]
        if not isinstance(image, Tensor):
            found: dict[str, Any] = self.steps(sample)
            return found
        if tuple(image.shape) != self.shape:
            raise ValueError(f"is {list(image.shape)}, and the model takes {list(self.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"holds {image.dtype}: uint8 or floating-point numbers are needed")
        return sample


class _Fit(v2.Transform):
    """Resize until the size over ``crop_pct`` is covered, and cut the middle out, as timm does."""

    def __init__(
        self, size: tuple[int, int], crop_pct: float, interpolation: InterpolationMode
    ) -> None:
        super().__init__()
        self.size, self.crop_pct, self.interpolation = tuple(size), crop_pct, interpolation

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = next(i for i in flat_inputs if isinstance(i, (Image.Image, tv_tensors.Image)))
        height, width = F.get_size(image)
        if (height, width) == self.size:
            return {"to": None}
        rows, columns = (int(side / self.crop_pct) for side in self.size)
        if rows == columns:  # the long side is cut off to a whole number, as torchvision does
            short, long = min(height, width), max(height, width)
            other = int(rows * long / short)
            return {"to": (other, rows) if width <= height else (rows, other)}
        ratio = min(height / rows, width / columns)
        return {"to": (round(height / ratio), round(width / ratio))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["to"] is None:
            return inpt
        resized = self._call_kernel(
            F.resize, inpt, list(params["to"]), interpolation=self.interpolation, antialias=True
        )
        return self._call_kernel(F.center_crop, resized, list(self.size))
