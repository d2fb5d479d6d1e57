"""Your own data set: any object with ``__len__`` and ``__getitem__``, as in torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from foveate.data.images import Unreadable, to_rgb
from foveate.data.seeds import seeded
from foveate.data.sources.base import IMAGE, NO_LABEL, OBJECTS, PIXELS, Source

__all__ = ["DatasetSource", "describe"]

_log = logging.getLogger(__name__)
# What Pillow and the file system raise; anything else is a mistake in the data set.
_UNREADABLE = (OSError, Image.DecompressionBombError, SyntaxError)
_LOOKED_AT = 8  # items whose labels are compared with what the data set says of itself


class DatasetSource(Source):
    """Items of a data set: an image alone, ``(image, label)``, or a dictionary with an "image".

    Pictures of Pillow and uint8 arrays ``[H, W, C]`` are augmented and resized like those of any
    other source. Tensors ``[C, H, W]`` are taken as they are: the data set's own transform has
    prepared them, and its randomness is seeded image by image.

    Args:
        dataset: the object.
        split: what its items are used for.
        labels: without them items need none, and nothing but the image is taken of them.
    """

    def __init__(self, dataset: Any, split: str, labels: bool = True) -> None:
        self.dataset, self.split, self.spec = dataset, split, describe(dataset)
        if isinstance(dataset, type):
            raise ValueError(f"{self.spec} is not a data set: give an object of it")
        self._images_alone, self.classes = not labels, None
        lacking = [name for name in ("__getitem__", "__len__") if not hasattr(dataset, name)]
        if lacking:
            raise ValueError(
                f"{self.spec} has no {' and no '.join(lacking)}: images are read by their number, "
                "so that a run can be resumed; a stream cannot be"
            )
        if not len(dataset):
            raise ValueError(f"{self.spec} is empty")
        with seeded((0, 0)):  # a transform of its own may be random
            first = self.sample(0)
        image = first["image"]
        self.finished = isinstance(image, Tensor)
        if self.finished:
            self.channels = image.shape[0]
        else:
            self.channels = 1 if np.asarray(image).shape[2:] in ((), (1,)) else 3
        if "label" in first:
            self._labels, named = self._read_labels()
            self.classes = self._names(named)
        elif labels and {"boxes", "semantic"} & set(first):
            keys = {"boxes": OBJECTS, "semantic": PIXELS}
            self.labels_of = tuple(what for key, what in keys.items() if key in first)
            names = getattr(dataset, "classes", None)
            self.classes = tuple(map(str, names)) if names else None
            self.pixel_classes = None if "boxes" in first else self.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int) -> dict[str, Any]:
        try:
            item = self.dataset[index]
        except _UNREADABLE as error:
            raise Unreadable(f"{self.name(index)}: {error}") from error
        except ValueError as error:
            if isinstance(error, Unreadable):  # as ``read_image`` raises it
                raise
            raise ValueError(f"{self.name(index)}: {error}") from error
        except (LookupError, TypeError, AttributeError) as error:  # of the data set's own code
            kind = type(error).__name__
            raise ValueError(f"{self.name(index)} cannot be read: {kind}: {error}") from error
        found = self._as_sample(item, index)
        if self.classes is not None and IMAGE in self.labels_of:
            self._check_label(found, index)
        return found

    def name(self, index: int) -> str:
        return f"item {index} of {self.spec}"

    def image(self, index: int) -> Any:
        return self.sample(index)["image"]

    def targets(self, index: int) -> dict[str, Any]:
        found = self.sample(index)
        del found["image"]
        return found

    def label(self, index: int) -> int:
        if self.classes is None or IMAGE not in self.labels_of:
            return NO_LABEL
        return int(self._labels[index])

    def content(self, index: int) -> bytes:
        with seeded((0, index)):  # a transform of its own may be random
            image = self.image(index)
        pixels = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
        return repr(pixels.shape).encode() + pixels.tobytes()

    def random(self) -> bool:
        """Tell whether an image differs each time it is read, as with a random transform."""
        seen = set()
        for seed in range(_LOOKED_AT):
            with seeded((seed, 0)):
                image = self.image(0)
            seen.add(np.asarray(image).tobytes())
        return len(seen) > 1

    def _read_labels(self) -> tuple[np.ndarray, bool]:
        """Return the class of every item, and whether the data set's names are of these."""
        stated, change = self._stated(), getattr(self.dataset, "target_transform", None)
        if stated is not None:
            found = stated
            if change is not None:
                changed = [
                    _whole(change(one), f"a target of {self.spec}") for one in stated.tolist()
                ]
                found = np.array(changed)
            if self._agrees(found):
                return found, np.array_equal(found, stated)
            _log.info("the items of %s have other labels than it states: all are read", self.spec)
        found = np.array([self._label_of(index) for index in range(len(self))])
        return found, change is None if stated is None else np.array_equal(found, stated)

    def _stated(self) -> np.ndarray | None:
        """Return the labels that the data set states, before any transform."""
        for attribute in ("targets", "labels"):
            found = getattr(self.dataset, attribute, None)
            if found is not None and len(found) == len(self):
                values = np.asarray(found)
                if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
                    return values
        return None

    def _agrees(self, labels: np.ndarray) -> bool:
        """Tell whether some evenly spaced items have these labels."""
        for index in np.linspace(0, len(self) - 1, min(_LOOKED_AT, len(self)), dtype=int).tolist():
            try:
                with seeded((0, index)):
                    label = self._label_of(index)
            except Unreadable:
                continue
            if label != labels[index]:
                return False
        return True

    def _label_of(self, index: int) -> int:
        sample = self.sample(index)
        self._check_label(sample, index)
        return int(sample["label"])

    def _check_label(self, sample: Mapping[str, Any], index: int) -> None:
        """Refuse an item unlike the first, since most labels are not read in advance."""
        if "label" not in sample:
            raise ValueError(f"{self.name(index)} has no label, though the first item has one")
        if self.classes is not None and not 0 <= sample["label"] < len(self.classes):
            raise ValueError(
                f"{self.name(index)} has the label {sample['label']}: the data set has the classes "
                f"0..{len(self.classes) - 1}"
            )

    def _names(self, own: bool) -> tuple[str, ...]:
        names = (getattr(self.dataset, "classes", None) or ()) if own else ()
        most = int(self._labels.max())
        if self._labels.min() < 0:
            raise ValueError(f"{self.spec} has labels below 0: classes are counted from 0")
        if names and most >= len(names):
            raise ValueError(f"{self.spec} names {len(names)} classes and has the label {most}")
        return tuple(map(str, names or range(most + 1)))

    def _as_sample(self, item: Any, index: int) -> dict[str, Any]:
        if isinstance(item, Mapping):
            found = dict(item)
        elif isinstance(item, (tuple, list)) and item and self._images_alone:
            found = {"image": item[0]}
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
            array = image if image.ndim == 3 else image[..., None]
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
                raise ValueError(
                    f"{self.name(index)} gives an array of {image.dtype} {list(image.shape)}: an "
                    "image is uint8, [H, W] or [H, W, C] with 1 or 3 channels"
                )
            found["image"] = array
        elif not (isinstance(image, Tensor) and image.ndim == 3):
            kind = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"{self.name(index)} gives {kind}: an image of Pillow, a uint8 array [H, W, C] or "
                "a tensor [C, H, W] is needed, alone, with a label, or as the 'image' of a dict"
            )
        if self._images_alone:
            return {"image": found["image"]}
        if "label" in found:
            found["label"] = _whole(found["label"], self.name(index))
        return found


def describe(dataset: Any) -> str:
    """Return the name of a data set for messages and the record of a run."""
    if isinstance(dataset, type):
        return f"the class {dataset.__name__}"
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
