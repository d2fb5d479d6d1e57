"""WebDataset shards: tar files that hold KEY.jpg beside KEY.cls or KEY.json.

They are not streamed but indexed: the headers are read once, then every image by its position. That
way an epoch is a true permutation of all images, a run is resumed at any image without reading
those before it, and no package is needed. The shards must be on a disk and not compressed; images
would gain nothing from compression.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
import re
import tarfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from foveate.data.images import SUFFIXES, Unreadable, decode_image
from foveate.data.sources.base import (
    NO_LABEL,
    SPLITS,
    WHOLE,
    NoSplit,
    PackedNames,
    Source,
    check_cut,
    read_names,
)

__all__ = ["ShardSource", "open_shards"]

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
_MOST_OPEN = 128  # files of a process; systems allow 256 to 1024
_BLOCK = 512  # of tar: headers and contents begin at multiples of it


@dataclass
class _Files:
    """Open files of this process; forks and pickles do not keep them."""

    paths: list[str]
    _open: OrderedDict[int, BinaryIO] = field(default_factory=OrderedDict)
    _owner: int = -1

    def __getstate__(self) -> list[str]:
        return self.paths

    def __setstate__(self, paths: list[str]) -> None:
        self.paths, self._open, self._owner = paths, OrderedDict(), -1

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        if self._owner != os.getpid():  # forked: the position in a file is shared with the parent
            self._close()
            self._owner = os.getpid()
        file = self._open.pop(shard, None) or open(self.paths[shard], "rb")
        self._open[shard] = file  # the last used at the end
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        file.seek(offset)
        return file.read(size)


@dataclass(frozen=True)
class ShardSource(Source):
    """Images in tar files by position; see ``Source``."""

    spec: str
    split: str
    files: _Files
    keys: PackedNames
    places: np.ndarray  # [N, 3]: shard, offset, size
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    channels: int = 3

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Image.Image:
        return decode_image(io.BytesIO(self.content(index)), self.name(index))

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.files.paths[self.places[index, 0]]}: {self.keys[index]}"

    def content(self, index: int) -> bytes:
        shard, offset, size = self.places[index].tolist()
        try:
            return self.files.read(shard, offset, size)
        except OSError as error:
            raise Unreadable(f"{self.name(index)}: {error}") from error

    def sizes(self) -> np.ndarray:
        return self.places[:, 2]


def open_shards(spec: str, location: str, split: str, labels: bool) -> ShardSource:
    """Open a pattern of tar files: ``train-{000..012}.tar``, ``*.tar`` or a folder of them.

    ``{split}`` in it stands for "train", "val" or "test"; without it all images are one set.
    Labels are whole numbers, in KEY.cls or as "label" in KEY.json. A file classes.txt beside the
    shards names the classes, one a line; else there are as many as the highest label says, so
    that a split without the last class seems to have fewer.
    """
    check_cut(spec, location, split)
    try:
        paths = _shards(location.replace("{split}", split))
    except ValueError as error:
        if split == WHOLE or not _has_any(location, split):
            raise
        raise NoSplit(f"{error}, for the split {split!r}") from error
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    found: list[int] = []
    for number, path in enumerate(paths):
        for key, sample in _samples(path).items():
            if sample.image is None:
                # A label of nothing is a mistake; a JSON file may be about the whole shard.
                if sample.label is not None and sample.label[0].lower().endswith(".cls"):
                    raise ValueError(f"{path}: {sample.label[0]} has no image beside it")
                continue
            member, offset, size = sample.image
            keys.append(member)
            places.append((number, offset, size))
            if labels:
                found.append(_label(path, key, sample))
    if not keys:
        raise ValueError(f"{location} holds no images ({', '.join(SUFFIXES)})")
    classes = _classes(paths, keys, places, found) if labels else None
    return ShardSource(
        spec=spec,
        split=split,
        files=_Files(paths),
        keys=PackedNames(keys),
        places=np.array(places, dtype=np.int64),
        labels=np.array(found, dtype=np.int64) if labels else None,
        classes=classes,
    )


@dataclass
class _Sample:
    """The content of a shard under one key.

    Attributes:
        image: name, offset and size of the member.
        label: name and content of the member.
    """

    image: tuple[str, int, int] | None = None
    label: tuple[str, bytes] | None = None


def _shards(pattern: str) -> list[str]:
    pattern = str(Path(pattern).expanduser())
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    paths: list[str] = []
    for each in _expanded(pattern):
        if os.path.isfile(each):
            paths.append(each)
            continue
        found = sorted(glob.glob(each, recursive=True))
        if not found:
            raise ValueError(f"there are no shards {each}")
        paths += found
    return paths


def _has_any(pattern: str, missing: str) -> bool:
    """Tell whether another split exists, so that only this one is missing."""
    for split in SPLITS:
        if split not in (missing, WHOLE):
            try:
                return bool(_shards(pattern.replace("{split}", split)))
            except ValueError:
                continue
    return False


def _expanded(pattern: str) -> list[str]:
    """Expand ``{000..012}`` and ``{a,b}``, in order."""
    parts = re.split(r"(\{[^{}]*\})", pattern)
    choices = [_choices(part) if part.startswith("{") else [part] for part in parts]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(braces: str) -> list[str]:
    inside = braces[1:-1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = int(span[1]), int(span[2])
        if first > last:
            raise ValueError(f"the range {braces} of shards runs backwards")
        return [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    if "," in inside:
        return inside.split(",")
    raise ValueError(f"cannot read {braces}: shards go as {{000..012}}, {{a,b}} or {{split}}")


def _samples(path: str) -> dict[str, _Sample]:
    """Return the members of a shard by key (the name up to its first dot), as in WebDataset."""
    with open(path, "rb") as file:
        start = file.read(6)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise ValueError(f"{path} is compressed ({name}): unpack it to a plain tar first")
        file.seek(0)
        samples: dict[str, _Sample] = {}
        last = "its first member"
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    last = member.name
                    if member.isfile():
                        _take(samples, member, path, file)
                end = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{path} is damaged at {last}: {error}") from error
        # The reader takes a header that is missing or damaged for the end of the archive.
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(f"{path} is cut short or damaged after {last}")
    return samples


def _take(samples: dict[str, _Sample], member: tarfile.TarInfo, path: str, file: BinaryIO) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    sample = samples.setdefault(f"{folder}/{stem}", _Sample())
    suffix = suffix.lower()
    if f".{suffix}" in SUFFIXES:
        if sample.image:
            raise ValueError(f"{path} has two images of one key: {sample.image[0]}, {member.name}")
        sample.image = member.name, member.offset_data, member.size
    elif suffix == "cls" or (suffix == "json" and sample.label is None):
        here = file.tell()
        file.seek(member.offset_data)
        sample.label = member.name, file.read(member.size)
        file.seek(here)


def _label(path: str, key: str, sample: _Sample) -> int:
    if sample.label is None:
        stem = key.strip("/")
        raise ValueError(f"{path}: {stem} has no label, neither {stem}.cls nor {stem}.json")
    member, content = sample.label
    label: Any = None
    try:
        label = json.loads(content)  # a whole number is JSON too
        label = label["label"] if member.lower().endswith(".json") else label
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {member} holds no label") from error
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ValueError(f"{path}: the label in {member} must be a class from 0, got {label!r}")
    return label


def _classes(
    paths: list[str], keys: list[str], places: list[tuple[int, int, int]], labels: list[int]
) -> tuple[str, ...]:
    listed = Path(paths[0]).parent / "classes.txt"
    highest = max(range(len(labels)), key=labels.__getitem__)
    classes = read_names(listed)
    if classes is None:
        return tuple(map(str, range(labels[highest] + 1)))
    if labels[highest] >= len(classes):
        where = f"{paths[places[highest][0]]}: {keys[highest]}"
        raise ValueError(f"{where} has the label {labels[highest]}, {listed} {len(classes)} names")
    return classes
