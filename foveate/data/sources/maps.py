"""Images with a class for each pixel: a folder of images and a folder of label maps."""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from foveate.data.images import Unreadable, find_images, read_image
from foveate.data.sources.base import (
    NAMES,
    PIXELS,
    WHOLE,
    FileSource,
    NoSplit,
    PackedNames,
    Tell,
    check_cut,
    read_names,
)
from foveate.data.sources.coco_json import LeftOut
from foveate.registry import suggest

__all__ = ["IGNORE", "MapSource", "open_maps"]

_log = logging.getLogger(__name__)
IGNORE = 255  # pixels of no class
_IMAGES, _MAPS = ("images",), ("masks", "labels", "annotations")
_SPLITS = {
    split: (*names, "training") if split == "train" else names for split, names in NAMES.items()
}
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class MapSource(FileSource):
    """Images and their label maps; see ``Source``.

    Attributes:
        files: paths of the images.
        maps: paths of the label maps.
        zero_ignored: whether 0 in a file means no class, so that classes begin with 1 there.
    """

    spec: str
    split: str
    files: PackedNames
    maps: PackedNames
    zero_ignored: bool
    classes: tuple[str, ...] | None
    left_out: LeftOut
    channels: int = 3
    labels_of: tuple[str, ...] = (PIXELS,)

    @property
    def pixel_classes(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """The classes: there are no others."""
        return self.classes

    def image(self, index: int) -> Image.Image:
        """Read the image without turning it by EXIF, because maps are not turned either."""
        return read_image(self.files[index], stored=True)

    def targets(self, index: int) -> dict[str, Any]:
        """Give the "semantic" map ``[H, W]``: a class from 0 for each pixel, 255 for none."""
        if self.classes is None:
            return {}
        return {"semantic": tv_tensors.Mask(torch.from_numpy(self._map(index)))}

    def sample(self, index: int) -> dict[str, Any]:
        sample = super().sample(index)
        if "semantic" in sample:
            width, height = sample["image"].size
            if tuple(sample["semantic"].shape) != (height, width):
                rows, columns = sample["semantic"].shape
                raise Unreadable(
                    f"{self.maps[index]} is {columns} x {rows} pixels, its image "
                    f"{self.files[index]} {width} x {height}"
                )
        return sample

    def class_counts(self, tell: Tell = iter) -> np.ndarray:
        assert self.classes is not None
        counts = np.zeros(IGNORE + 1, dtype=np.int64)
        for index in tell(range(len(self))):
            counts += np.bincount(self._map(index).ravel(), minlength=len(counts))
        return counts[: len(self.classes)]

    def _map(self, index: int) -> np.ndarray:
        found = _read_map(self.maps[index], self.zero_ignored)
        assert self.classes is not None
        highest = int(found.max(initial=0, where=found != IGNORE))
        if highest >= len(self.classes):
            raise ValueError(
                f"{self.maps[index]} has the class {highest + self.zero_ignored}, and there are "
                f"{len(self.classes)} classes from {int(self.zero_ignored)}"
            )
        return found


def _read_map(path: str, zero_ignored: bool) -> np.ndarray:
    """Read the classes ``[H, W]`` uint8 of a file; 255 is no class."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes: label maps pack well
            with Image.open(path) as image:
                mode = image.mode
                values = np.asarray(image) if mode in _MODES else None
    except Exception as error:  # decoders raise many kinds
        raise Unreadable(
            f"{path}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if values is None:
        raise ValueError(f"{path} is of the mode {mode}; a label map is grey or has a palette")
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > IGNORE:
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(
            f"{path} has the number {wrong}; classes lie in 0..{IGNORE - 1}, and {IGNORE} is none"
        )
    if zero_ignored:
        values = np.where((values == 0) | (values == IGNORE), IGNORE, values - 1)
    return values.astype(np.uint8)


def open_maps(spec: str, location: str, split: str, labels: bool) -> MapSource:
    """Open ``PATH`` with images and masks in it, or ``IMAGES:MAPS``, two folders.

    Usual are ``images/train`` with ``masks/train``, ``labels/train`` or ``annotations/train``, and
    ``train/images`` with ``train/masks``; ADE20K calls its splits training and validation. In the
    other form ``{split}`` stands for "train", "val" or "test"; without it all images are one set.
    An image and its map have the same path in their folders, but for the suffix. ``[zero=ignore]``
    at the end says that 0 is no class. A file classes.txt in PATH, or beside the maps, names the
    classes, one a line; else the maps of the training images are read to count them.
    """
    location, zero_ignored = _options(spec, location)
    images, maps = _located(spec, location, split)
    known = _maps_by_name(maps) if labels else {}
    left_out = LeftOut()
    pairs = []
    for path in find_images(images):
        inside = path.relative_to(images)
        if not labels:
            pairs.append((path, path))
        elif inside.with_suffix("") in known:
            pairs.append((path, known.pop(inside.with_suffix(""))))
        else:
            left_out.add(f"images without a map in {maps}", str(inside))
    for path in known.values():
        left_out.add(f"maps without an image in {images}", str(path.relative_to(maps)))
    if not pairs:
        raise ValueError(
            f"no image in {images} has a map in {maps}: both must have the same names in the same "
            "subfolders"
        )
    if left_out.reasons:
        _log.warning("%s: %d images; left out: %s", spec, len(pairs), left_out.sentence())
    files, found = (PackedNames(map(str, each)) for each in zip(*pairs, strict=True))
    classes = None
    if labels:
        classes = _named(maps, location) or _counted(spec, location, found, zero_ignored)
    return MapSource(spec, split, files, found, zero_ignored, classes, left_out)


def _maps_by_name(folder: Path) -> dict[Path, Path]:
    """Return label maps by their path in the folder, without the suffix."""
    found: dict[Path, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("")
        if name in found:
            raise ValueError(
                f"{found[name]} and {path} are maps of the same image; remove one of them"
            )
        found[name] = path
    return found


def _options(spec: str, location: str) -> tuple[str, bool]:
    match = re.fullmatch(r"(.*?)\[(.*)\]", location)
    if not match:
        return location, False
    key, _, value = (part.strip() for part in match[2].partition("="))
    if key != "zero":
        raise ValueError(suggest("option of masks", key, ("zero",)))
    if value != "ignore":
        raise ValueError(f"zero must be ignore, or be left out, got {value!r} in {spec!r}")
    return match[1], True


def _located(spec: str, location: str, split: str) -> tuple[Path, Path]:
    """Return the folders of images and maps of a split."""
    if ":" in location:
        check_cut(spec, location, split)
        folders = [
            Path(part.replace("{split}", split)).expanduser() for part in location.split(":")
        ]
        if len(folders) != 2:
            raise ValueError(f"{spec!r} names {len(folders)} folders: it is masks:IMAGES:MAPS")
        missing = [folder for folder in folders if not folder.is_dir()]
        if missing:
            error = NoSplit if "{split}" in location else ValueError
            raise error(f"there is no folder {missing[0]}")
        return folders[0], folders[1]
    root = Path(location).expanduser()
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {kind}; a folder of images and label maps is needed")
    found = {one: places for one in (*_SPLITS, WHOLE) if (places := _pair(root, one))}
    if split in found and (split != WHOLE or len(found) == 1):
        return found[split]
    cut = [one for one in found if one != WHOLE]
    if cut:
        raise NoSplit(f"{root} has the splits {', '.join(cut)}, and no {split}")
    if found:
        raise NoSplit(f"{root} is not cut into train, val and test, so there is no split {split!r}")
    raise ValueError(
        f"{root} holds no images/train with masks/train or the like; masks:IMAGES:MAPS names the "
        "folders"
    )


def _pair(root: Path, split: str) -> tuple[Path, Path] | None:
    for images in _IMAGES:
        for maps in _MAPS:
            if split == WHOLE:
                places = [(root / images, root / maps)]
            else:
                places = [
                    pair
                    for name in _SPLITS[split]
                    for pair in (
                        (root / images / name, root / maps / name),
                        (root / name / images, root / name / maps),
                    )
                ]
            for pair in places:
                if all(folder.is_dir() for folder in pair):
                    return pair
    return None


def _named(maps: Path, location: str) -> tuple[str, ...] | None:
    """Read the names of the classes from a file."""
    places = [maps, maps.parent, maps.parent.parent]
    if ":" not in location:
        places.append(Path(location).expanduser())
    for place in places:
        names = read_names(place / "classes.txt")
        if names is not None and len(names) > IGNORE:
            raise ValueError(f"{place} names {len(names)} classes; at most {IGNORE} are read")
        if names is not None:
            return names
    return None


def _counted(spec: str, location: str, maps: PackedNames, zero_ignored: bool) -> tuple[str, ...]:
    """Return as many classes as the highest number in the training maps needs."""
    try:
        folder = _located(spec, location, "train")[1]
    except NoSplit:
        paths = [maps[i] for i in range(len(maps))]
    else:
        paths = list(map(str, find_images(folder)))
    _log.info("%s: %d label maps are read to count the classes", spec, len(paths))
    highest = 0
    for path in paths:
        found = _read_map(path, zero_ignored)
        highest = max(highest, int(found.max(initial=0, where=found != IGNORE)))
    return tuple(map(str, range(highest + 1)))
