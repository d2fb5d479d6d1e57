"""Measure how well a model with a method agrees with the dense model, image by image."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import Backbone, ReducedViT, Reducer, dense
from foveate.core.evaluation import answering
from foveate.core.host import on_grid
from foveate.core.schedule import check_choice
from foveate.data import ImageFiles, Inputs, find_images

__all__ = ["JUDGES", "Agreement", "Judge", "LEAST_IMAGES", "Pictures", "kind_of", "read_pictures"]

JUDGES = ("classes", "features")
LEAST_IMAGES = 4
_TOGETHER = 8  # images in a forward pass

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images in random order: those at even places choose the candidate, the others report on it.

    Attributes:
        pixels: preprocessed images, ``[N, channels, H, W]``.
        names: names of the files; for a tensor, the places of the images in it.
    """

    pixels: Tensor
    names: tuple[str, ...]

    @property
    def choosing(self) -> list[int]:
        """Places of the images that choose."""
        return list(range(0, len(self.names), 2))

    @property
    def reporting(self) -> list[int]:
        """Places of the images that report."""
        return list(range(1, len(self.names), 2))


def read_pictures(model: nn.Module, given: Tensor | Paths, count: int, seed: int) -> Pictures:
    """Draw at most ``count`` images, and prepare them as evaluation does.

    Args:
        model: model that the images are prepared for.
        given: files and folders, or preprocessed images.
        count: largest number of images.
        seed: seed of the drawing.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < LEAST_IMAGES:
        raise ValueError(
            f"count must be at least {LEAST_IMAGES}, half of the images to choose and half to "
            f"report, got {count!r}"
        )
    inputs, draw, like = Inputs.of(model), random.Random(seed), next(model.parameters())
    if isinstance(given, Tensor):
        shape = (inputs.channels, *inputs.size)
        if given.ndim != 4 or tuple(given.shape[1:]) != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(
                f"images must be [N, {wanted}] for this model, got {list(given.shape)}"
            )
        if not given.is_floating_point():
            raise ValueError(
                f"images in a tensor must be floats, normalised for the model, got {given.dtype}: "
                "normalise them, or give files"
            )
        order = draw.sample(range(len(given)), min(count, len(given)))
        _check_enough(len(order), "the tensor")
        pixels = given[order].detach()
        for number, image in zip(order, pixels, strict=True):
            if not bool(image.isfinite().all()):
                raise ValueError(f"image {number} of the tensor contains NaN or infinity")
        return Pictures(pixels.to(like), tuple(map(str, order)))
    files = find_images(given)
    where = os.fspath(given) if isinstance(given, str | os.PathLike) else "what was given"
    _check_enough(len(files), where)
    read = list(islice(ImageFiles(draw.sample(files, len(files))), count))
    _check_enough(len(read), where)
    pixels = inputs.batch((image for _, image in read), like)
    return Pictures(pixels, tuple(_short(path, where) for path, _ in read))


def _check_enough(found: int, where: str) -> None:
    if found < LEAST_IMAGES:
        raise ValueError(
            f"at least {LEAST_IMAGES} images are needed, half of them to choose and half to "
            f"report; {where} has {found}"
        )


def _short(path: Path, where: str) -> str:
    """Return a file's path within the given folder, or its name."""
    return str(path.relative_to(where)) if path.is_relative_to(where) else path.name


def kind_of(backbone: Backbone, judge: str | None) -> str:
    """Return what is compared: ``judge``, or classes if the model has any, else features."""
    if judge is None:
        return "classes" if backbone.classifies else "features"
    check_choice("judge", judge, JUDGES)
    if judge == "classes" and not backbone.classifies:
        raise ValueError("this model has no classifier, so there are no classes to compare")
    return judge


@dataclass(frozen=True)
class Agreement:
    """Mean agreement with the dense model over some images.

    Attributes:
        distance: what the search minimises: the divergence (KL) of the classes, or 1 - similarity
            of the features.
        same: share of images with the same most likely class; None for features.
    """

    distance: float
    same: float | None


class Judge:
    """Compares models with the dense model by their answers to the same images.

    Features are compared patch by patch on the whole grid, by cosine similarity after the mean
    feature of the choosing images is subtracted: what all patches share would hide differences.
    """

    def __init__(self, backbone: Backbone, pictures: Pictures, kind: str) -> None:
        self.backbone, self.pictures, self.kind = backbone, pictures, kind
        plain = dense(backbone)
        with answering(plain):
            parts = [self._answer(plain, part) for part in _parts(range(len(pictures.names)))]
            wanted = torch.cat(parts)
        if not bool(wanted.isfinite().all()):
            raise ValueError("the model's answers contain NaN or infinity: its weights are broken")
        if kind == "features":
            self._mean = wanted[pictures.choosing].mean((0, 1))
        self._wanted = wanted

    def model(self, reducer: Reducer) -> ReducedViT:
        """Return the model with a method that has been built for it."""
        like = next(self.backbone.model.parameters())
        driver: type[ReducedViT] = self.backbone.driver or ReducedViT
        return driver(self.backbone, reducer.to(like.device, like.dtype))

    def compare(self, model: ReducedViT, numbers: Sequence[int]) -> list[tuple[float, bool | None]]:
        """Return each image's distance, and whether its class is the same (None for features)."""
        found: list[tuple[float, bool | None]] = []
        with answering(model):
            for part in _parts(numbers):
                answer, wanted = self._answer(model, part), self._wanted[part]
                if self.kind == "features":
                    near = F.cosine_similarity(answer - self._mean, wanted - self._mean, dim=2)
                    found += [(1 - value, None) for value in near.mean(1).tolist()]
                    continue
                p, q = wanted.log_softmax(1), answer.log_softmax(1)
                apart = (p.exp() * (p - q)).sum(1).tolist()
                same = (wanted.argmax(1) == answer.argmax(1)).tolist()
                found += zip(apart, same, strict=True)
        return found

    def _answer(self, model: ReducedViT, numbers: Sequence[int]) -> Tensor:
        state = model.tokens(self.pictures.pixels[list(numbers)], track=self.kind == "features")
        if self.kind == "classes":
            return model.backbone.head(state).double()
        return on_grid(state)[:, state.prefix :].float()


def _parts(numbers: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), _TOGETHER):
        yield list(numbers[start : start + _TOGETHER])
