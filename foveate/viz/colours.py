"""Colours that people with any kind of colour vision can tell apart, and scales of them."""

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

# Okabe and Ito's palette without black, which outlines use.
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
    """The library, for its fonts and colour scales; it draws nothing, so no backend matters."""
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    # An unknown $MPLBACKEND would stop the import itself; a good one is set as the import does.
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
    """One colour for each number, ``[groups, 3]`` float; the same whatever the image or block.

    Seven hues, light and dark. Neighbouring numbers are far apart in the list, and so neighbouring
    groups, whose numbers are near each other, differ.
    """
    base = np.array(OKABE_ITO, dtype=float)
    shades = np.concatenate([base, 0.5 * base])
    picks = (np.arange(groups) * _GOLDEN % 1 * len(shades)).astype(int)
    return shades[picks]


def _scale(values: np.ndarray) -> np.ndarray:
    """Colours of numbers from 0 to 1, float RGB: dark blue to yellow, even in lightness."""
    return 255 * _colours()[np.round(255 * np.clip(values, 0, 1)).astype(int)]


@lru_cache
def _colours() -> np.ndarray:
    return matplotlib().colormaps["viridis"](np.arange(256))[:, :3]


def _grey(pixels: np.ndarray) -> np.ndarray:
    """The lightness of pixels as float RGB."""
    return np.repeat((pixels @ _LUMA)[..., None], 3, axis=-1)


def dimmed(pixels: np.ndarray) -> np.ndarray:
    """What is left out: much darker and nearly without colour, yet no black, which stays may be."""
    return 0.25 * (0.3 * pixels + 0.7 * _grey(pixels)) + 28


def overlay(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Pixels in grey under the scale's colours; what a colour bar shows lies on medium grey."""
    return 0.3 * _grey(pixels) + 0.7 * _scale(values)


def blend(pixels: np.ndarray, colour: np.ndarray, strength: float) -> np.ndarray:
    """Pixels in a colour, their own light and shade still to be seen."""
    return (1 - strength) * _grey(pixels) + strength * colour
