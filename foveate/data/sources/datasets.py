"""A data set of one's own: any object with ``__len__`` and ``__getitem__``, as torch has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from foveate.data.images import to_rgb
from foveate.data.seeds import seeded
from foveate.data.sources.base import NO_LABEL, Source

__all__ = ["DatasetSource", "describe"]


class DatasetSource(Source):
    """Items of a data set: an image alone, ``(image, label)``, or a dictionary with an "image".

    Pictures of Pillow and uint8 arrays ``[H, W, C]`` are augmented and resized like those of any
    other source. Tensors ``[C, H, W]`` are taken as they are: the data set's own transform has the
    last word on them, and what is random in it is seeded image by image.

    Args:
        dataset: the object.
        split: what its items are used for.
        labels: without them items need none.
    """

    def __init__(self, dataset: Any, split: str, labels: bool = True) -> None:
        self.dataset, self.split, self.spec = dataset, split, describe(dataset)
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ValueError(
                f"{self.spec} has no __len__ and __getitem__: images are read by their number, "
                "so that a run can be resumed; a stream cannot be"
            )
        if not len(dataset):
            raise ValueError(f"{self.spec} is empty")
        first = self.sample(0)
        image = first["image"]
        self.finished = isinstance(image, Tensor)
        if self.finished:
            self.channels = image.shape[0]
        else:
            self.channels = 1 if np.asarray(image).shape[2:] in ((), (1,)) else 3
        self.classes = None
        if labels and "label" in first:
            self.classes = self._names()

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int) -> dict[str, Any]:
        try:
            item = self.dataset[index]
        except OSError as error:  # an image that cannot be read; anything else is a mistake
            raise ValueError(f"{self.name(index)}: {error}") from error
        return self._as_sample(item, index)

    def image(self, index: int) -> Any:
        return self.sample(index)["image"]

    def targets(self, index: int) -> dict[str, Any]:
        found = self.sample(index)
        del found["image"]
        return found

    def label(self, index: int) -> int:
        return NO_LABEL if self.classes is None else int(self._labels[index])

    def content(self, index: int) -> bytes:
        with seeded((0, index)):  # a transform of its own may be random
            image = self.image(index)
        pixels = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
        return repr(pixels.shape).encode() + pixels.tobytes()

    @cached_property
    def _labels(self) -> np.ndarray:
        """The class of every item: what the data set says of itself, or what its items say."""
        for attribute in ("targets", "labels"):
            found = getattr(self.dataset, attribute, None)
            if found is not None and len(found) == len(self):
                values = np.asarray(found)
                if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
                    return values
        return np.array([_whole(self.sample(i)["label"], self.name(i)) for i in range(len(self))])

    def _names(self) -> tuple[str, ...]:
        names = getattr(self.dataset, "classes", None) or ()
        most = int(self._labels.max())
        if self._labels.min() < 0:
            raise ValueError(f"{self.spec} has labels below 0: classes are counted from 0")
        if names and most >= len(names):
            raise ValueError(f"{self.spec} names {len(names)} classes and has the label {most}")
        return tuple(map(str, names or range(most + 1)))

    def _as_sample(self, item: Any, index: int) -> dict[str, Any]:
        if isinstance(item, Mapping):
            found = dict(item)
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            image, target = item
            more = target if isinstance(target, Mapping) else {"label": target}
            found = {"image": image, **more}
        else:
            found = {"image": item}
        image = found.get("image")
        if isinstance(image, Image.Image):
            found["image"] = image if image.mode == "L" else to_rgb(image)
        elif isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3):
                raise ValueError(f"{self.name(index)} is no uint8 array [H, W, C]")
            found["image"] = image if image.ndim == 3 else image[..., None]
        elif not (isinstance(image, Tensor) and image.ndim == 3):
            kind = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"{self.name(index)} gives {kind}: an image of Pillow, a uint8 array [H, W, C] or "
                "a tensor [C, H, W] is needed, alone, with a label, or as the 'image' of a dict"
            )
        if "label" in found:
            found["label"] = _whole(found["label"], self.name(index))
        return found


def describe(dataset: Any) -> str:
    """What a data set is called in messages and in the record of a run."""
    size = f" ({len(dataset)} items)" if hasattr(dataset, "__len__") else ""
    return f"{type(dataset).__name__}{size}"


def _whole(label: Any, name: str) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError):
        raise ValueError(f"{name} has the label {label!r}: a whole number is needed") from None
    if number != label:
        raise ValueError(f"{name} has the label {label!r}: a whole number is needed")
    return number
