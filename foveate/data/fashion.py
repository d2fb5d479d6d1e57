"""Fashion-MNIST: a part of it ships with the package, the whole is read from a folder.

Grey pictures of clothing, 28 x 28, in ten classes. Copyright 2017 Zalando SE, MIT licence
(files/LICENSE.fashion-mnist). The part that ships is the first 300 training and the first 200
test images of each class, as they are.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import zlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CLASSES",
    "LabelledImages",
    "fashion_mnist",
    "fashion_mnist_mini",
    "find_fashion_mnist",
    "normalise",
]

CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
MEAN, STD = 0.2860, 0.3530  # of the training pixels
_PARTS = ("train", "test")
_DIGESTS = {  # SHA-256 of the content
    "train-images-idx3-ubyte.gz": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte.gz": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class LabelledImages(NamedTuple):
    """Images ``[N, 1, 28, 28]`` uint8 and their classes ``[N]`` int64."""

    images: Tensor
    labels: Tensor


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 pixels into floats of zero mean and unit spread over the training set."""
    return (images.float() / 255 - MEAN) / STD


def fashion_mnist_mini(part: str = "test") -> LabelledImages:
    """Return the images that ship with the package: 3 000 of "train", 2 000 of "test"."""
    _check_part(part)
    images, labels = (_unpacked()[f"{part}_{what}"].copy() for what in ("images", "labels"))
    return LabelledImages(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


@cache
def _unpacked() -> dict[str, np.ndarray]:
    """Unpack the images that ship, once for all splits that are opened."""
    packed = files("foveate.data").joinpath("files", "fashion_mnist_mini.npz.xz").read_bytes()
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as arrays:
        return dict(arrays)


def find_fashion_mnist(folder: str | os.PathLike[str]) -> Path:
    """Find the folder with the four files of Fashion-MNIST and check each; ValueError otherwise.

    This looks in ``folder``, in ``raw`` and in ``FashionMNIST/raw``, where torchvision puts them.
    """
    places = [Path(folder), Path(folder) / "raw", Path(folder) / "FashionMNIST" / "raw"]
    best = max(places, key=lambda place: sum((place / name).is_file() for name in _DIGESTS))
    missing = [name for name in _DIGESTS if not (best / name).is_file()]
    if missing:
        raise ValueError(
            f"{best} holds no {', '.join(missing)}: `foveate data fashion-mnist` says where to "
            "get them"
        )
    for name in _DIGESTS:
        _content(best / name)
    return best


def fashion_mnist(folder: str | os.PathLike[str], part: str = "train") -> LabelledImages:
    """Read the whole set from a folder: 60 000 images of "train", 10 000 of "test"."""
    _check_part(part)
    place, stem = find_fashion_mnist(folder), {"train": "train", "test": "t10k"}[part]
    pixels = bytearray(_content(place / f"{stem}-images-idx3-ubyte.gz")[16:])  # after the header
    labels = bytearray(_content(place / f"{stem}-labels-idx1-ubyte.gz")[8:])
    return LabelledImages(
        torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28),
        torch.frombuffer(labels, dtype=torch.uint8).long(),
    )


def _content(path: Path) -> bytes:
    """Return the content of a file, checked; its compression does not matter."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if hashlib.sha256(content).hexdigest() != _DIGESTS[path.name]:
        raise ValueError(f"{path} is damaged or another file: its checksum is wrong")
    return content


def _check_part(part: str) -> None:
    if part not in _PARTS:
        raise ValueError(f"part must be one of {', '.join(map(repr, _PARTS))}; got {part!r}")
