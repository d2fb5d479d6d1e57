"""A folder of images, one subfolder a class, or without classes."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from foveate.data.images import SUFFIXES, find_images, read_image
from foveate.data.sources.base import NAMES, NO_LABEL, WHOLE, FileSource, NoSplit, PackedNames

__all__ = ["FolderSource", "open_folder"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource(FileSource):
    """Image files of one split; see ``Source``."""

    spec: str
    split: str
    files: PackedNames
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    channels: int = 3

    def image(self, index: int) -> Image.Image:
        return read_image(self.files[index])

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else int(self.labels[index])


def open_folder(spec: str, location: str, split: str, labels: bool) -> FolderSource:
    """Open ``PATH/train/CLASS/...`` and its siblings val and test, or ``PATH/CLASS/...`` itself.

    The classes are the subfolders of "train" in alphabetical order, for the other splits too.
    Without labels all images in all subfolders count.
    """
    root = Path(location).expanduser()
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {kind}; a folder of images is needed")
    splits = _splits(root) or {WHOLE: root}
    if split not in splits:
        if WHOLE in splits:
            raise NoSplit(
                f"{root} is not cut into train, val and test, so there is no split {split!r}: all "
                "its images are one set"
            )
        found = ", ".join(sorted(folder.name for folder in splits.values()))
        wanted = " or ".join(NAMES.get(split, (split,)))
        raise NoSplit(f"{root} holds {found} and no folder {wanted} for the split {split!r}")
    folder = splits[split]
    if not labels:
        files = PackedNames(map(str, find_images(folder)))
        return FolderSource(spec, split, files, None, None)
    classes = _classes(splits.get("train", folder))
    unknown = [name for name in _classes(folder) if name not in classes]
    if unknown:
        raise ValueError(
            f"{folder} has classes that {splits['train']} has not: {', '.join(map(repr, unknown))}"
        )
    return _labelled(spec, split, folder, classes)


def _labelled(spec: str, split: str, folder: Path, classes: tuple[str, ...]) -> FolderSource:
    files: list[Path] = []
    counts = []
    for name in classes:
        # A class of "train" may have no image in "val", but not the other way round.
        inside = find_images(folder / name) if (folder / name).is_dir() else []
        files += inside
        counts.append(len(inside))
    loose = sum(path.name.lower().endswith(SUFFIXES) for path in folder.iterdir())
    if loose:
        _log.warning("%s: %d images beside the class folders are left out", folder, loose)
    labels = np.repeat(np.arange(len(classes)), counts)
    return FolderSource(spec, split, PackedNames(map(str, files)), labels, classes)


def _splits(root: Path) -> dict[str, Path]:
    """Return the folders of the splits; empty if the folder's subfolders are classes.

    A class may be called "train" or "test" as well: such a folder is a split if another one is
    there, if nothing else is, or if it has subfolders.
    """
    names = set(_subfolders(root))
    found = {}
    for split, known in NAMES.items():
        name = next((name for name in known if name in names), None)
        if name:
            found[split] = root / name
    alone = names <= {name for known in NAMES.values() for name in known}
    sure = len(found) >= 2 or alone or any(map(_subfolders, found.values()))
    return found if sure else {}


def _classes(folder: Path) -> tuple[str, ...]:
    names = _subfolders(folder)
    if not names:
        count = len(find_images(folder))
        raise ValueError(
            f"{folder} holds {count} image{'s' * (count != 1)} and no subfolders: labels come from "
            "a subfolder for each class; only pretrain and adapt work without labels"
        )
    return tuple(names)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
