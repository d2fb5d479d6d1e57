"""Images that say which they are, in files and in memory, and loaders of them."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from foveate.data import Augment, Loader, Source, Unreadable, eval_transform, train_transform


def colour(number: int) -> Image.Image:
    return Image.new("RGB", (12, 8), (20 * number % 256, 40, 90))


def red(source: Source, index: int) -> int:
    """What ``colour`` was asked for, give or take JPEG."""
    return round(int(np.asarray(source.image(index))[4, 6, 0]) / 20)


def png(number: int) -> bytes:
    stream = io.BytesIO()
    colour(number).save(stream, "PNG")
    return stream.getvalue()


def tree(root: Path, files: dict[str, int]) -> Path:
    for name, number in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour(number).save(root / name)
    return root


PLAIN = eval_transform((4, 4), 1)
SHIFTED = train_transform(Augment(crop="pad", pad=2), (4, 4), 1)


@dataclass
class Numbers(Source):
    """Images that show their number; some cannot be read."""

    count: int = 40
    broken: frozenset[int] = frozenset()
    per_class: int = 10
    spec: str = "numbers"
    split: str = "train"
    channels: int = 1
    classes: tuple[str, ...] | None = ("a", "b", "c", "d")
    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> np.ndarray:
        self.read.append(index)
        if index in self.broken:
            raise Unreadable(f"{self.name(index)}: torn")
        return np.full((4, 4, 1), index % 256, dtype=np.uint8)

    def label(self, index: int) -> int:
        return -1 if self.classes is None else index // self.per_class

    def name(self, index: int) -> str:
        return f"number {index}"

    def content(self, index: int) -> bytes:
        return self.image(index).tobytes()

    def sizes(self) -> np.ndarray:
        return np.full(self.count, 16)


def train(source: Any = None, transform: Any = SHIFTED, **options: Any) -> Loader:
    return Loader(source or Numbers(), transform, **{"batch": 6, "seed": 3, **options})


def evaluation(source: Any = None, **options: Any) -> Loader:
    return Loader(source or Numbers(), PLAIN, **{"batch": 6, "train": False, **options})


def same(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a["unreadable"] == b["unreadable"]
        and all(torch.equal(a[k], b[k]) for k in ("image", "label", "index"))
        for a, b in zip(one, other, strict=True)
    )


def seen(batches: list[dict]) -> list[int]:
    return [i for batch in batches for i in batch["index"].tolist()]
