"""Images as a model trains on them: cut, flipped and recoloured, as a function of a key."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from foveate.core.schedule import check_choice
from foveate.data.images import to_rgb

__all__ = ["CROPS", "INTERPOLATIONS", "Augment", "Transform", "eval_transform", "train_transform"]

CROPS = ("resized", "pad", "none")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")  # Pillow turns images with no other


class Transform(Protocol):
    """From an image to pixels ``[C, H, W]`` uint8; all that is random in it follows the key."""

    size: tuple[int, int]
    channels: int

    def __call__(self, image: Image.Image | np.ndarray, key: tuple[int, ...]) -> np.ndarray: ...


@dataclass(kw_only=True)
class Augment:
    """What is done to training images.

    Normalisation, erasing and mixing are not: they are faster on the device.

    Attributes:
        crop: "resized" cuts a part of random area and shape and resizes it; "pad" adds ``pad``
            black pixels on every side and cuts the size out of that; "none" takes the middle.
        scale: least and most area of a resized crop, as fractions of the image.
        ratio: least and most width / height of a resized crop.
        pad: pixels, for ``crop="pad"``.
        flip: how often the image is mirrored, 0 to 1.
        colour: strength of the jitter of brightness, contrast and saturation; 0 for none.
        auto: a policy of timm, such as "rand-m9-mstd0.5-inc1", "3a" or "original"; None for none.
        interpolation: of every resizing and turning.
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
    """Two ascending numbers; YAML gives lists."""
    pair = tuple(given) if isinstance(given, (list, tuple)) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 < pair[0] <= pair[1] <= most:
        end = f" up to {most:g}" if most < float("inf") else ""
        raise ValueError(f"{name} must be two ascending numbers above 0{end}, got {given!r}")
    return pair


def _policy(auto: str, channels: int, size: tuple[int, int], interpolation: str) -> Any:
    """The policy as timm builds it."""
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
    """Keep the upper bits; at their strongest, policies of timm ask for none, which is black.

    Older versions of Pillow give that; newer ones raise, which ends a run at some hundred images.
    """
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))


def train_transform(augment: Augment, size: tuple[int, int], channels: int) -> Transform:
    """Build what turns training images into pixels ``[channels, *size]``."""
    _check_output(size, channels)
    return _Train(augment, (size[0], size[1]), channels)


def eval_transform(
    size: tuple[int, int],
    channels: int,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
) -> Transform:
    """Build what resizes the short side to ``size / crop_pct`` and cuts out the middle.

    Images that have the size already stay as they are.
    """
    _check_output(size, channels)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if not _is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct!r}")
    return _Eval((size[0], size[1]), channels, crop_pct, interpolation)


def _check_output(size: tuple[int, int], channels: int) -> None:
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"size must be a height and a width in pixels, got {size!r}")
    check_choice("channels", channels, (1, 3))


@dataclass
class _Eval:
    size: tuple[int, int]
    channels: int
    crop_pct: float
    interpolation: str

    def __post_init__(self) -> None:
        self._fit = create_transform(
            self.size,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            use_prefetcher=True,  # leaves the pixels as they are
        ).transforms[:-1]

    def __call__(self, image: Image.Image | np.ndarray, key: tuple[int, ...] = ()) -> np.ndarray:
        """Give the middle of the image; nothing is random, so the key changes nothing."""
        return _channels_first(self.pixels(image))

    def pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The same as ``[H, W, C]``, which may share the memory of the image."""
        if isinstance(image, np.ndarray) and image.shape == (*self.size, self.channels):
            return image
        picture = _picture(image, self.channels)
        if picture.size != self.size[::-1]:
            for step in self._fit:
                picture = step(picture)
        return _array(picture)


@dataclass
class _Train:
    augment: Augment
    size: tuple[int, int]
    channels: int
    _steps: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        a = self.augment
        self._fit = _Eval(self.size, self.channels, 1.0, a.interpolation)
        self._cut = RandomResizedCropAndInterpolation(
            self.size, scale=a.scale, ratio=a.ratio, interpolation=a.interpolation
        )
        if a.auto is not None:
            self._steps.append(_policy(a.auto, self.channels, self.size, a.interpolation))
        if a.colour:
            self._steps.append(transforms.ColorJitter(a.colour, a.colour, a.colour))

    def __call__(self, image: Image.Image | np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        draws, resized = _Draws(key), self.augment.crop == "resized"
        mirror = draws.fraction() < self.augment.flip
        if resized:
            picture = _picture(image, self.channels)
        else:
            pixels = self._placed(self._fit.pixels(image), mirror, draws)
            if not self._steps:
                return _channels_first(pixels)
            picture = _picture(pixels, self.channels)
        with draws.everywhere():
            if resized:
                picture = self._cut(picture)
                picture = ImageOps.mirror(picture) if mirror else picture
            for step in self._steps:
                picture = step(picture)
        return _channels_first(_array(picture))

    def _placed(self, pixels: np.ndarray, mirror: bool, draws: _Draws) -> np.ndarray:
        """Mirror, then shift with black coming in: the same as to pad and cut."""
        if mirror:
            pixels = pixels[:, ::-1]
        pad = self.augment.pad
        if self.augment.crop != "pad" or not pad:
            return pixels
        height, width = self.size
        top, left = draws.below(2 * pad + 1), draws.below(2 * pad + 1)
        padded = np.zeros((height + 2 * pad, width + 2 * pad, self.channels), dtype=np.uint8)
        padded[pad : pad + height, pad : pad + width] = pixels
        return padded[top : top + height, left : left + width]


class _Draws:
    """Random numbers that follow from a key alone, a few at once.

    A hash costs 2 microseconds; a generator of numpy takes 10 times that to be made.
    """

    def __init__(self, key: tuple[int, ...]) -> None:
        digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=32).digest()
        self._pool = int.from_bytes(digest, "little")

    def _next(self) -> int:
        self._pool, draw = divmod(self._pool, 1 << 32)
        return draw

    def fraction(self) -> float:
        return self._next() / (1 << 32)

    def below(self, end: int) -> int:
        return self._next() * end >> 32

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Seed the generators that timm and torchvision draw from; put them back afterwards.

        The model in this process draws from them too, and a run that is resumed does not repeat
        the images before. torch.manual_seed would reach the generators of the devices as well.
        """
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            random.seed(self._next())
            np.random.seed(self._next())
            torch.default_generator.manual_seed(self._next())
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def _picture(image: Image.Image | np.ndarray, channels: int) -> Image.Image:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return image.convert("L") if channels == 1 else to_rgb(image)


def _array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
