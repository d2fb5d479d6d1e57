"""Images to measure on. They matter to methods whose token count depends on the image."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from foveate.data import ImageFiles, Preprocessing, fashion_mnist_mini, normalise
from foveate.dense import DenseModel, Hosting

__all__ = ["Images", "images_for", "natural_images", "pictures_for", "read_images"]

_FASHION = (1, 28, 28)
_SYNTHETIC = "synthetic, 1/f noise with varying exponent, contrast and flat regions"


class Images(NamedTuple):
    """Images ``[N, C, H, W]`` as a model takes them, and their source in words."""

    pixels: Tensor
    source: str

    def take(self, count: int, start: int = 0) -> Tensor:
        """Return ``count`` images from ``start`` on; begin again when they are used up."""
        index = torch.arange(start, start + count) % len(self.pixels)
        return self.pixels.index_select(0, index)


def images_for(
    channels: int, size: tuple[int, int], count: int, seed: int, given: Tensor | Images | None
) -> Images:
    """Return given images, or those that ship for models they fit, or synthetic ones.

    Args:
        channels: number of channels of the model's input.
        size: height and width of the input.
        count: number of images that are wanted; ``given`` may be fewer.
        seed: seed of synthetic images.
        given: images from the user.
    """
    shape = (channels, *size)
    if given is not None:
        return _given(given, count, channels, size)
    if shape == _FASHION:
        return Images(normalise(fashion_mnist_mini().images), "Fashion-MNIST, test images")
    return Images(natural_images(count, size, seed, channels), _SYNTHETIC)


def pictures_for(model: Hosting, count: int, seed: int, given: Tensor | Images | None) -> Images:
    """Return images of one size for a dense model; arguments are those of ``images_for``.

    Detectors and segmenters take values from 0 to 1, dense backbones normalised ones.
    """
    channels = model.reduced.backbone.channels
    if given is not None:
        return _given(given, count, channels, None)
    made = natural_images(count, _side_lengths(model, None), seed, channels)
    if isinstance(model, DenseModel):
        made = (0.5 + 0.25 * made).clamp(0, 1)
    return Images(made, _SYNTHETIC)


def _given(
    given: Tensor | Images, count: int, channels: int, size: tuple[int, int] | None
) -> Images:
    images = given if isinstance(given, Images) else Images(given, "given by the caller")
    pixels = images.pixels
    shape = (channels, *(size or pixels.shape[2:]))
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != shape or len(pixels) == 0:
        wanted = ", ".join(map(str, (channels, *(size or ("H", "W")))))
        raise ValueError(f"images must be [N, {wanted}] for this model, got {list(pixels.shape)}")
    again = ", used again where a batch needs more" if len(pixels) < count else ""
    return Images(pixels, f"{images.source}: {len(pixels)}{again}")


def _side_lengths(model: Hosting, first: tuple[int, int] | None) -> tuple[int, int]:
    """Return the size that images of a dense model are cut to: its own, or the first image's.

    A side whose padding would be whole patches is shortened, so that all cells have a token.
    """
    size, patch = model.input_size, model.reduced.backbone.spec.patch
    if isinstance(model, DenseModel) and model.transform.image_size is None:
        if first is None:
            raise ValueError(
                "this model takes images of any size, so none is known to measure at: give images "
                "(--images PATH)"
            )
        size = first
    multiple = model.trunk.size_divisible
    sides = [
        side if math.ceil(side / cell) * cell % multiple == 0 else side - side % multiple
        for side, cell in zip(size, patch, strict=True)
    ]
    if min(sides) < 1:
        raise ValueError(f"images must be at least {multiple} pixels high and wide, got {size}")
    return sides[0], sides[1]


def read_images(model: nn.Module, paths: Sequence[str | os.PathLike[str]], count: int) -> Images:
    """Read at most ``count`` images from files and folders, as ``model`` takes them."""
    files = ImageFiles(paths)
    if isinstance(model, DenseModel):
        return _read_pictures(model, files, count)
    prepare = Preprocessing.of(model)
    pixels = torch.stack([prepare(image).tensor for _, image in islice(files, count)])
    return Images(pixels, "from files")


def _read_pictures(model: DenseModel, files: ImageFiles, count: int) -> Images:
    size: tuple[int, int] | None = None
    found: list[Tensor] = []
    for _, image in islice(files, count):
        size = size or _side_lengths(model, (image.height, image.width))
        fitted = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        found.append(model.pixels(fitted))
    assert size is not None
    return Images(torch.stack(found), f"from files, cut and resized to {size[0]} x {size[1]}")


def natural_images(count: int, size: tuple[int, int], seed: int, channels: int = 3) -> Tensor:
    """Make synthetic images with natural statistics, ``[count, C, H, W]`` float32.

    They are noise whose amplitude falls as 1 / f**a, as in photographs. The exponent, the contrast
    and a smooth window that leaves part of the picture flat differ between images, so images
    differ in how many patches are worth a token. The same ``seed`` gives the same images.
    """
    noise = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(size))

    def field_of(channels: int, exponent: float) -> Tensor:
        white = torch.randn(channels, *size, generator=noise)
        smooth = torch.fft.irfft2(torch.fft.rfft2(white) / frequency**exponent, s=size)
        return (smooth - smooth.mean((1, 2), keepdim=True)) / smooth.std((1, 2), keepdim=True)

    images = []
    for _ in range(count):
        exponent, contrast, level = (
            low + (high - low) * float(torch.rand((), generator=noise))
            for low, high in ((0.7, 1.6), (0.4, 1.4), (-2.0, 1.0))
        )
        grey, colour = field_of(1, exponent), field_of(channels, exponent)
        window = torch.sigmoid(6 * (field_of(1, 2.5) - level))
        images.append(contrast * window * (0.9 * grey + 0.4 * colour))
    return torch.stack(images)
