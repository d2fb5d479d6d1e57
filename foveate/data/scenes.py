"""Scenes of garments on clutter: small labelled images for detection and segmentation.

They are made of the Fashion-MNIST images that ship with the package, so they need no files. A scene
follows from its size, seed, split and number alone, on every machine: only numpy computes it, with
a generator that is frozen. Training, validation and test scenes show different garments.

A garment is scaled, turned, mirrored and painted over what came before it; distractors, garments
cut into tiles and shuffled, lie among them and have no label. What is visible of each garment is
known to the pixel.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from foveate.data.fashion import CLASSES, fashion_mnist_mini

__all__ = ["PIXEL_CLASSES", "Scene", "draw_scene"]

PIXEL_CLASSES = ("background", *CLASSES)
_SIDE = 28  # of a garment's image
_HELD = 60  # of the 300 training garments of a class that only validation scenes show
_SPLITS = ("train", "val", "test")
_SEEN = 8  # darker pixels are background
_MOST = 6  # garments of a scene
_TRIES = 8  # to find a place for one
_LEAST_VISIBLE = 0.5  # of a garment that others cover
_TILE = 7


class Scene(NamedTuple):
    """A scene and its objects.

    Attributes:
        image: ``[H, W, C]`` uint8.
        masks: visible pixels of each garment ``[N, H, W]`` uint8; no two share one.
        labels: class of each garment ``[N]``.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray

    def semantic(self) -> np.ndarray:
        """Give the class of each pixel ``[H, W]`` uint8: 0 for background, a garment's plus 1."""
        weights = (self.labels + 1).astype(np.uint8)[:, None, None]
        found: np.ndarray = (self.masks * weights).sum(0, dtype=np.uint8)
        return found


def draw_scene(
    size: tuple[int, int],
    channels: int,
    seed: int,
    split: str,
    index: int,
    clutter: float = 1.0,
) -> Scene:
    """Draw a scene; about one in thirty has no garment.

    Args:
        size: height and width in pixels.
        channels: 1 for grey, 3 for colour.
        seed: seed of the set.
        split: "train", "val" or "test".
        index: number in the split.
        clutter: from 0 (upright garments in full contrast on a dark, even ground, nothing else) to
            1: how far garments are turned and how faint they are, how bright and how busy the
            ground is, and how many distractors there are.
    """
    key = [seed, _SPLITS.index(split), index]
    draw = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))
    garments = _garments(split)
    canvas = _background(draw, *size, clutter)
    if channels == 3:
        canvas = canvas * draw.uniform(0.6, 1.0, 3)
    else:
        canvas = canvas[..., :1]
    count = 0 if draw.rand() < 1 / 30 else draw.randint(1, _MOST + 1)
    labelled = np.concatenate(
        [np.ones(count, bool), np.zeros(round(clutter * draw.randint(1, 4)), bool)]
    )
    draw.shuffle(labelled)
    masks: list[np.ndarray] = []
    full: list[int] = []  # pixels of each garment before others covered it
    labels: list[int] = []
    for real in labelled.tolist():
        number = draw.randint(len(garments.labels))
        picture = garments.pictures[number]
        if not real:
            picture = _shuffled(draw, picture)
        tint = draw.uniform(0.45, 1.0, channels) if channels == 3 else np.ones(1)
        low = clutter * draw.uniform(20, 70)
        high = 255 - clutter * (255 - draw.uniform(190, 255))
        for _ in range(_TRIES):
            placed = _place(draw, picture, *size, clutter)
            covered = placed.alpha >= 0.5
            if not covered.any() or not _leaves_visible(placed.window, covered, masks, full):
                continue
            window, alpha = placed.window, placed.alpha[..., None]
            shade = (low + (high - low) * placed.brightness(picture))[..., None] * tint
            canvas[window] += alpha * (shade - canvas[window])
            for mask in masks:
                mask[window] &= ~covered
            if real:
                mask = np.zeros(size, dtype=bool)
                mask[window] = covered
                masks.append(mask)
                full.append(int(covered.sum()))
                labels.append(int(garments.labels[number]))
            break
    canvas = canvas + clutter * draw.normal(0, 4, size)[..., None]
    return Scene(
        np.round(canvas).clip(0, 255).astype(np.uint8),
        np.stack(masks).astype(np.uint8) if masks else np.zeros((0, *size), dtype=np.uint8),
        np.array(labels, dtype=np.int64),
    )


class _Garments(NamedTuple):
    """Pictures ``[N, 28, 28, 2]``: brightness times opacity, and opacity, in 0..1; labels."""

    pictures: np.ndarray
    labels: np.ndarray


@cache
def _garments(split: str) -> _Garments:
    found = fashion_mnist_mini("test" if split == "test" else "train")
    images, labels = found.images[:, 0].numpy(), found.labels.numpy()
    if split != "test":
        held = np.zeros(len(labels), dtype=bool)
        for label in range(len(CLASSES)):
            held[np.flatnonzero(labels == label)[-_HELD:]] = True
        chosen = held if split == "val" else ~held
        images, labels = images[chosen], labels[chosen]
    opaque = _silhouettes(images)
    brightness = _even_border(images / 255.0, opaque) * opaque
    return _Garments(np.stack([brightness, opaque], -1).astype(np.float64), labels)


def _silhouettes(images: np.ndarray) -> np.ndarray:
    """Find the garment in each image ``[N, 28, 28]``: all that no path of dark pixels reaches.

    So a dark print on a shirt belongs to it.
    """
    dark = np.pad(images < _SEEN, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    outside = np.zeros_like(dark)
    outside[:, 0] = True
    while True:
        grown = outside.copy()
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown[:, :, 1:] |= outside[:, :, :-1]
        grown[:, :, :-1] |= outside[:, :, 1:]
        grown &= dark
        if (grown == outside).all():
            break
        outside = grown
    solid = ~outside
    solid &= _around(solid.astype(float)) > 3  # single bright pixels are no garment
    return solid[:, 1:-1, 1:-1]


def _around(images: np.ndarray) -> np.ndarray:
    """Sum each pixel ``[N, H, W]`` and its eight neighbours; a border of zeros is around images."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    found: np.ndarray = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    return found


def _even_border(brightness: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    """Brighten pixels at the border of a garment to the mean of those further inside.

    They are darker because the black around the garment was mixed in, and would look like teeth on
    a brighter background.
    """
    inner = opaque & (_around(opaque.astype(float)) == 9)
    count = _around(inner.astype(float))
    inside = _around(brightness * inner) / np.maximum(count, 1)
    return np.where(inner, brightness, np.maximum(brightness, inside))


def _shuffled(draw: np.random.RandomState, picture: np.ndarray) -> np.ndarray:
    """Cut a picture into tiles and put them together in another order."""
    tiles = _SIDE // _TILE
    pieces = (
        picture.reshape(tiles, _TILE, tiles, _TILE, 2).swapaxes(1, 2).reshape(-1, _TILE, _TILE, 2)
    )
    pieces = pieces[draw.permutation(len(pieces))].reshape(tiles, tiles, _TILE, _TILE, 2)
    return pieces.swapaxes(1, 2).reshape(picture.shape)


def _background(draw: np.random.RandomState, height: int, width: int, clutter: float) -> np.ndarray:
    """Clouds with bars and patches ``[H, W, 3]``."""
    y = (np.arange(height) + 0.5)[:, None] / height
    x = (np.arange(width) + 0.5)[None] / width
    canvas = np.empty((height, width, 3))
    clouds = 30 + clutter * draw.uniform(0, 120, (draw.randint(3, 7),) * 2 + (1,))
    canvas[:] = _smooth(clouds, height, width)
    for _ in range(draw.randint(3, 9)):
        level = draw.uniform(0, 220, 3) * 0.4 + draw.uniform(0, 220) * 0.6
        strength = clutter * draw.uniform(0.2, 0.7)
        angle, extent = draw.uniform(0, np.pi), draw.uniform(0.03, 0.25, 2)
        dy, dx = y - draw.rand(), x - draw.rand()
        along = np.abs(dx * np.cos(angle) + dy * np.sin(angle))
        across = np.abs(dy * np.cos(angle) - dx * np.sin(angle))
        shape = draw.randint(3)
        if shape == 0:  # a bar through the image
            inside = across < extent[0] / 2
        elif shape == 1:
            inside = (along < extent[0]) & (across < extent[1])
        else:
            inside = (along / extent[0]) ** 2 + (across / extent[1]) ** 2 < 1
        canvas[inside] += strength * (level - canvas[inside])
    return canvas


def _smooth(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch a grid of values over the image, bilinearly."""
    y = np.linspace(0, grid.shape[0] - 1, height)[:, None].repeat(width, 1)
    x = np.linspace(0, grid.shape[1] - 1, width)[None].repeat(height, 0)
    return _sampled(grid, y, x)


def _sampled(picture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Read a picture ``[h, w, C]`` between its pixels, at places within it."""
    top = np.minimum(y.astype(int), picture.shape[0] - 2)
    left = np.minimum(x.astype(int), picture.shape[1] - 2)
    down, right = (y - top)[..., None], (x - left)[..., None]
    flat, width = picture.reshape(-1, picture.shape[2]), picture.shape[1]
    corner = top * width + left
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + width] * (1 - right) + flat[corner + width + 1] * right
    return upper * (1 - down) + lower * down


class _Placed(NamedTuple):
    """A picture on the canvas: its window, its opacity there, and the sampled places."""

    window: tuple[slice, slice]
    alpha: np.ndarray
    y: np.ndarray
    x: np.ndarray

    def brightness(self, picture: np.ndarray) -> np.ndarray:
        """Read the brightness in the window."""
        mixed = _sampled(_bordered(picture[..., :1]), self.y, self.x)[..., 0]
        found: np.ndarray = mixed / np.maximum(self.alpha, 1e-6)
        return found


def _place(
    draw: np.random.RandomState, picture: np.ndarray, height: int, width: int, clutter: float
) -> _Placed:
    """Put a picture somewhere."""
    short = min(height, width)
    scale = short * np.exp(draw.uniform(np.log(0.26), np.log(0.62))) / _SIDE
    angle, mirrored = clutter * draw.uniform(-0.6, 0.6), draw.rand() < 0.5
    # The middle stays so far inside that most of the garment is in the image.
    margin = 0.3 * scale * _SIDE
    middle_y = draw.uniform(margin, height - margin)
    middle_x = draw.uniform(margin, width - margin)
    reach = scale * _SIDE / 2 * (abs(np.cos(angle)) + abs(np.sin(angle)))
    top, bottom = max(0, int(middle_y - reach)), min(height, int(np.ceil(middle_y + reach)))
    left, right = max(0, int(middle_x - reach)), min(width, int(np.ceil(middle_x + reach)))
    dy = np.arange(top, bottom)[:, None] + 0.5 - middle_y
    dx = np.arange(left, right)[None] + 0.5 - middle_x
    x = (dx * np.cos(angle) + dy * np.sin(angle)) / scale
    y = (dy * np.cos(angle) - dx * np.sin(angle)) / scale
    x = (-x if mirrored else x) + _SIDE / 2 + 0.5  # of a picture with an empty border of one pixel
    y = y + _SIDE / 2 + 0.5
    y, x = y.clip(0, _SIDE + 1), x.clip(0, _SIDE + 1)
    alpha = _sampled(_bordered(picture[..., 1:]), y, x)[..., 0]
    return _Placed((slice(top, bottom), slice(left, right)), alpha, y, x)


def _bordered(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((1, 1), (1, 1), (0, 0)))


def _leaves_visible(
    window: tuple[slice, slice], covered: np.ndarray, masks: list[np.ndarray], full: list[int]
) -> bool:
    """Tell whether enough of the earlier garments stays visible."""
    return all(
        mask.sum() - (mask[window] & covered).sum() >= _LEAST_VISIBLE * whole
        for mask, whole in zip(masks, full, strict=True)
    )
