"""Any data set from one string: ``open_source("folder:photos", "train")``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveate.core.schedule import check_choice
from foveate.data.sources.base import SPLITS, WHOLE, NoSplit, Source
from foveate.data.sources.coco import CocoSource, open_coco
from foveate.data.sources.datasets import DatasetSource, describe
from foveate.data.sources.folders import open_folder
from foveate.data.sources.libraries import open_hf, open_torchvision
from foveate.data.sources.maps import IGNORE, MapSource, open_maps
from foveate.data.sources.memory import ArraySource, open_fashion_mnist
from foveate.data.sources.scenes import (
    Scenes,
    SceneSource,
    open_scenes,
    scene_size,
    write_scenes,
)
from foveate.data.sources.shards import open_shards
from foveate.registry import suggest

__all__ = [
    "IGNORE",
    "KINDS",
    "SPLITS",
    "WHOLE",
    "ArraySource",
    "CocoSource",
    "DatasetSource",
    "MapSource",
    "NoSplit",
    "SceneSource",
    "Scenes",
    "Source",
    "open_first",
    "open_source",
    "scene_size",
    "write_scenes",
]

# Each takes the spec, the location in it ("" if none), the split and whether labels are needed.
_OPEN: dict[str, Callable[[str, str, str, bool], Source]] = {
    "fashion-mnist": open_fashion_mnist,
    "folder": open_folder,
    "torchvision": open_torchvision,
    "shards": open_shards,
    "hf": open_hf,
    "coco": open_coco,
    "masks": open_maps,
    "scenes": open_scenes,
}
KINDS = {
    "fashion-mnist": "the part that ships; fashion-mnist:FOLDER is the whole",
    "folder": "folder:PATH, one subfolder a class, in train, val and test or directly",
    "torchvision": "torchvision:NAME:FOLDER, a class of torchvision.datasets and its files",
    "shards": "shards:PATTERN, WebDataset tar files such as data/{split}-{000..012}.tar",
    "hf": "hf:NAME or hf:PATH, a Hugging Face data set",
    "coco": "coco:PATH or coco:FILE.json:FOLDER, objects with boxes and masks, as COCO has them",
    "masks": "masks:PATH or masks:IMAGES:MAPS, a class for each pixel; [zero=ignore] for ADE20K",
    "scenes": "scenes or scenes:size=96,train=2000, garments on clutter, made without files",
}
_WITHOUT_A_PLACE = ("fashion-mnist", "scenes")


def open_source(spec: Any, split: str = "train", *, labels: bool = True) -> Source:
    """Open a data set.

    Args:
        spec: ``KIND`` or ``KIND:LOCATION``, see ``KINDS``; a path alone is a folder. Your own data
            set, an object, is a set without splits.
        split: "train", "val" or "test" of a set with splits, "all" of one without; ``NoSplit`` if
            the set has no such split.
        labels: without them ``classes`` is None, and images need not have any.
    """
    check_choice("split", split, SPLITS)
    if not isinstance(spec, (str, Path)):
        if split != WHOLE:
            raise NoSplit(f"{describe(spec)} is one set, so there is no split {split!r}")
        return DatasetSource(spec, split, labels)
    spec = str(spec)
    kind, colon, location = spec.partition(":")
    if kind not in _OPEN:
        return _OPEN["folder"](spec, _existing(spec, kind), split, labels)
    if not location and (colon or kind not in _WITHOUT_A_PLACE):
        raise ValueError(f"{spec!r} names no place: {KINDS[kind]}")
    return _OPEN[kind](spec, location, split, labels)


def open_first(spec: Any, splits: Sequence[str], *, labels: bool = True) -> Source:
    """Open the first of some splits that a set has."""
    missing: NoSplit | None = None
    for split in splits:
        try:
            return open_source(spec, split, labels=labels)
        except NoSplit as error:
            missing = missing or error
    assert missing is not None
    raise missing


def _existing(spec: str, kind: str) -> str:
    """Return a path that was given without a kind, if it exists."""
    if spec and Path(spec).expanduser().exists():
        return spec
    if not spec or "/" in kind or "\\" in kind or kind.startswith((".", "~")):
        raise ValueError(f"the data {spec!r} do not exist; kinds of data are {', '.join(_OPEN)}")
    raise ValueError(suggest("data set", kind, _OPEN))
