"""Choose colours that people with any kind of colour vision can tell apart."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = [
    "BROUGHT_BACK",
    "EXTRA",
    "blend",
    "dimmed",
    "group_colours",
    "matplotlib",
    "overlay",
]

# The palette of Okabe and Ito without black, which is the colour of outlines.
OKABE_ITO = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
)
BROUGHT_BACK = OKABE_ITO[1]
EXTRA = OKABE_ITO[5]
_GOLDEN = (5**0.5 - 1) / 2
_LUMA = np.array((0.299, 0.587, 0.114))


def matplotlib() -> Any:
    """Import matplotlib for its fonts and colour scales; it draws nothing and needs no backend."""
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    # An unknown $MPLBACKEND would make the import fail; a known one is set afterwards.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def group_colours(groups: int) -> np.ndarray:
    """Return one colour for each number, ``[groups, 3]`` float, the same for all images and blocks.

    There are seven hues, each light and dark. Numbers close to each other get different colours,
    because neighbouring groups have such numbers.
    """
    base = np.array(OKABE_ITO, dtype=float)
    shades = np.concatenate([base, 0.5 * base])
    picks = (np.arange(groups) * _GOLDEN % 1 * len(shades)).astype(int)
    return shades[picks]


def _scale(values: np.ndarray) -> np.ndarray:
    """Map numbers from 0 to 1 to float RGB, from dark blue to yellow in even steps of lightness."""
    return 255 * _colours()[np.round(255 * np.clip(values, 0, 1)).astype(int)]


@lru_cache
def _colours() -> np.ndarray:
    return matplotlib().colormaps["viridis"](np.arange(256))[:, :3]


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Return the lightness of pixels as float RGB."""
    return np.repeat((pixels @ _LUMA)[..., None], 3, axis=-1)


def dimmed(pixels: np.ndarray) -> np.ndarray:
    """Darken pixels that are left out, but not to black, which may be the colour of kept ones."""
    return 0.25 * (0.3 * pixels + 0.7 * _grey(pixels)) + 28


def overlay(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Lay the colours of a scale over the pixels in grey; colour bars pass medium grey pixels."""
    return 0.3 * _grey(pixels) + 0.7 * _scale(values)


def blend(pixels: np.ndarray, colour: np.ndarray, strength: float) -> np.ndarray:
    """Tint pixels in a colour and keep their light and shade visible."""
    return (1 - strength) * _grey(pixels) + strength * colour
