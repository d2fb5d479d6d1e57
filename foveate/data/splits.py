"""Training, validation and test images that do not overlap.

A set that has splits keeps them. From a set without a validation split a part of the training
images is held out. Whether an image is held out follows from its content and a seed alone, so every
run, every process and every later evaluation holds out the same ones, and copies of an image are
never on both sides.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.sources import WHOLE, DatasetSource, NoSplit, Source, open_first, open_source
from foveate.data.sources.base import IMAGE
from foveate.data.sources.datasets import describe

__all__ = [
    "Part",
    "Splits",
    "common_images",
    "divide",
    "final_images",
    "holds_out",
    "limited",
    "open_images",
    "open_splits",
    "place",
]

_log = logging.getLogger(__name__)
NONE = "none"  # for ``val``: nothing is validated
_MOST_BYTES = 2**29  # that are read of two splits to compare them; of more, a part is compared
_MOST_UNSIZED = 50_000  # images that are read in full where their sizes are not known


class Part(Source):
    """Some images of a source."""

    def __init__(self, whole: Source, indices: np.ndarray, split: str) -> None:
        self.whole, self.indices, self.split = whole, indices, split
        self.spec, self.classes, self.channels = whole.spec, whole.classes, whole.channels
        self.finished, self.labels_of = whole.finished, whole.labels_of
        self.pixel_classes, self.category_ids = whole.pixel_classes, whole.category_ids

    def __len__(self) -> int:
        return len(self.indices)

    def _of_whole(self, index: int) -> int:
        return int(self.indices[index])

    def image(self, index: int) -> Any:
        return self.whole.image(self._of_whole(index))

    def label(self, index: int) -> int:
        return self.whole.label(self._of_whole(index))

    def targets(self, index: int) -> dict[str, Any]:
        return self.whole.targets(self._of_whole(index))

    def sample(self, index: int) -> dict[str, Any]:
        return self.whole.sample(self._of_whole(index))

    def name(self, index: int) -> str:
        return self.whole.name(self._of_whole(index))

    def content(self, index: int) -> bytes:
        return self.whole.content(self._of_whole(index))

    def sizes(self) -> np.ndarray | None:
        found = self.whole.sizes()
        return None if found is None else found[self.indices]

    def boxes_only(self) -> Source:
        return Part(self.whole.boxes_only(), self.indices, self.split)


@dataclass(frozen=True)
class Splits:
    """The images of a run.

    Attributes:
        train: images to train on.
        val: images by which rates, epochs and the best checkpoint are chosen; None if a job needs
            none.
        test: images for the final test; None if the data have none.
        held_out: share and seed of the division, where "val" was held out of the training images.
        common: for each pair of splits, the number of images in both, and the number compared.
    """

    train: Source
    val: Source | None = None
    test: Source | None = None
    held_out: tuple[float, int] | None = None
    common: dict[str, tuple[int, int]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the splits for the record of a run."""
        found: dict[str, Any] = {}
        for name in ("train", "val", "test"):
            source: Source | None = getattr(self, name)
            if source is not None:
                found[name] = {"data": source.spec, "split": source.split, "images": len(source)}
        if self.held_out is not None:
            share, seed = self.held_out
            found["val"] |= {"held_out_of": self.train.spec, "share": share, "seed": seed}
        found["in_both"] = {
            pair: {"images": both, "compared": compared}
            for pair, (both, compared) in self.common.items()
        }
        return found

    def sentence(self) -> str:
        """Describe the splits in one line."""
        parts = [f"{len(self.train)} training images of {self.train.spec}"]
        if self.val is not None and self.held_out is not None:
            share, seed = self.held_out
            parts.append(
                f"{len(self.val)} for validation, held out of them by content "
                f"(share {share:g}, seed {seed})"
            )
        elif self.val is not None:
            split = "" if self.val.split == WHOLE else f" ({self.val.split})"
            parts.append(f"{len(self.val)} for validation of {self.val.spec}{split}")
        parts.append("no test images" if self.test is None else f"{len(self.test)} test images")
        return "; ".join(parts)


def open_splits(
    train: Any,
    val: Any = None,
    test: Any = None,
    *,
    share: float = 0.1,
    seed: int = 0,
    allowed: int = 0,
    labels: bool = True,
    labels_of: str = IMAGE,
) -> Splits:
    """Open the images for training, for validation and for the final test.

    Args:
        train: as ``open_source`` takes it.
        val: a set of its own for validation; None takes the split "val" of ``train``, or holds
            out a part of its training images where it has none; "none" is for jobs that choose
            nothing.
        test: a set of its own for the test; None takes the split "test" of ``train`` if it has one.
        share: of the training images that is held out.
        seed: of the division. It does not follow the seed of a run, so that runs with several
            seeds are validated on the same images.
        allowed: how many images two splits may have in common.
        labels: without them images need none.
        labels_of: what the job learns labels of: the whole "image", "objects" or "pixels".
    """
    if not 0 < share < 1:
        raise ValueError(f"data.val_share must lie between 0 and 1, got {share}")
    _refuse_the_same(train, val, test)
    training = open_first(train, ("train", WHOLE), labels=labels)
    if labels:
        _check_labels(training, labels_of)
    if isinstance(val, str) and val == NONE:
        return Splits(training)
    divided: tuple[float, int] | None = None
    if val is not None:
        held = open_first(val, ("val", WHOLE, "test"), labels=labels)
    elif (own := _own_split(train, "val", labels)) is not None:
        held = own
    else:
        if isinstance(training, DatasetSource) and training.random():
            _log.warning(
                "%s changes its images at random, also those that are now held out of it for "
                "validation: give data.val a set of its own, without that transform",
                training.spec,
            )
        kept, out = divide(training, share, seed)
        training, held = Part(training, kept, "train"), Part(training, out, "val")
        divided = (share, seed)
    if test is not None:
        final: Source | None = open_first(test, ("test", WHOLE, "val"), labels=labels)
    else:
        final = _own_split(train, "test", labels)
    named: dict[str, Source | None] = {"training": training, "validation": held, "test": final}
    _check_classes(named)
    if labels:
        for source in filter(None, (held, final)):
            _check_labels_of(source, labels_of)
    common = _check_common(named, divided is not None, allowed)
    return Splits(training, held, final, divided, common)


def final_images(train: str, val: str | None, test: str | None) -> tuple[str, str | None]:
    """Return the images that judge a trained model, and their split, as a plan takes them.

    They are the test images, or the validation images if there are no test images.
    """
    if test is not None:
        return test, None
    if _own_split(train, "test", labels=False) is not None:
        return train, "test"
    return (train, "val") if val in (None, NONE) else (str(val), None)


def holds_out(train: str, val: str | None) -> bool:
    """Tell whether a run takes its validation images out of its training images."""
    return val is None and _own_split(train, "val", labels=False) is None


def open_images(
    spec: str,
    split: str | None = None,
    *,
    share: float = 0.1,
    seed: int = 0,
    labels: bool = True,
    labels_of: str = IMAGE,
) -> Source:
    """Open images to judge a model by.

    Args:
        spec: as ``open_source`` takes it.
        split: the split; None takes "test", or else "val", or else "all". "val" of a set without
            one is the part that training holds out.
        share: share that training holds out.
        seed: seed of that choice.
        labels: without them images need none.
        labels_of: what must have labels: the whole "image", "objects" or "pixels".
    """
    found = _open_images(spec, split, share, seed, labels)
    if labels:
        _check_labels_of(found, labels_of)
    return found


def _open_images(spec: str, split: str | None, share: float, seed: int, labels: bool) -> Source:
    if split is None:
        return open_first(spec, ("test", "val", WHOLE), labels=labels)
    try:
        return open_source(spec, split, labels=labels)
    except NoSplit:
        if split != "val":
            raise
    training = open_first(spec, ("train", WHOLE), labels=labels)
    return Part(training, divide(training, share, seed)[1], "val")


def divide(source: Source, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the images of a source by their content into those that stay and those held out.

    The side of an image depends only on the image. So it stays the same when other images are
    added, with or without labels, and copies of an image stay together.
    """
    content = b"".join(_digest(source.content(i), seed) for i in range(len(source)))
    digests = np.frombuffer(content, dtype="<u8")
    order = np.unique(digests)
    if len(order) < 2:
        what = "1 image" if len(source) == 1 else f"{len(source)} images, all alike"
        raise ValueError(
            f"{source.spec} has {what}: to divide it into training and validation two that differ "
            "are needed, or data.val names a set of its own"
        )
    # Both sides have an image at least.
    end = min(max(int(share * 2**64), int(order[0]) + 1), int(order[-1]))
    held = digests < np.uint64(end)
    return np.flatnonzero(~held), np.flatnonzero(held)


def limited(source: Source, count: int | None, *, balanced: bool) -> Source:
    """Take ``count`` images of a source: some of every class, or evenly spaced ones.

    Args:
        source: the images.
        count: how many; None, or more than there are, takes all.
        balanced: one image of each class, then a second one of each, and so on; without classes
            any, and so where objects or pixels have them. The choice is always the same.
    """
    total = len(source)
    if count is None or count >= total:
        return source
    if count < 1:
        raise ValueError(f"limit must be a whole number from 1, got {count}")
    if not balanced:
        return Part(source, np.arange(count) * total // count, source.split)
    order = np.random.RandomState(0).permutation(total)
    if source.classes is not None and IMAGE in source.labels_of:
        labels = np.array([source.label(i) for i in order.tolist()])
        by_class = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        turn = np.empty(total, dtype=np.int64)
        turn[by_class] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        order = order[np.argsort(turn, kind="stable")]
    return Part(source, np.sort(order[:count]), source.split)


def common_images(one: Source, other: Source) -> tuple[list[tuple[int, int]], int]:
    """Find images that are in both sources, and how many of the second were compared.

    Images are the same if their content is. Only those whose size occurs on both sides are read;
    of very large sets an evenly spaced part of the second is compared.
    """
    here, there = one.sizes(), other.sizes()
    if here is None or there is None:
        if len(one) + len(other) > _MOST_UNSIZED:
            return [], 0
        mine, its, compared = np.arange(len(one)), np.arange(len(other)), len(other)
    else:
        step, much = 1, True
        while much:
            every = np.arange(0, len(there), step)
            its, compared = every[np.isin(there[every], here)], len(every)
            mine = np.flatnonzero(np.isin(here, there[its]))
            much = len(its) > 1 and here[mine].sum() + there[its].sum() > _MOST_BYTES
            step *= 2
    known = {_digest(one.content(int(i)), 0): int(i) for i in mine}
    found = [
        (known[digest], int(i))
        for i in its
        if (digest := _digest(other.content(int(i)), 0)) in known
    ]
    return found, compared


def _own_split(spec: Any, split: str, labels: bool) -> Source | None:
    """Open a split if the set has it."""
    try:
        return open_source(spec, split, labels=labels)
    except NoSplit:
        return None


def _digest(content: bytes, seed: int) -> bytes:
    key = int(seed).to_bytes(8, "little")
    return hashlib.blake2b(content, digest_size=8, key=key).digest()


def _refuse_the_same(train: Any, val: Any, test: Any) -> None:
    """Refuse a set that is named twice, or one inside another."""
    named = {"data.train": train, "data.val": val, "data.test": test}
    for (one, first), (other, second) in combinations(named.items(), 2):
        if first is None or second is None:
            continue
        a, b = place(first), place(second)
        if a == b:
            second = second if isinstance(second, str) else describe(second)
            first = first if isinstance(first, str) else "it"
            raise ValueError(
                f"{one} and {other} name the same images, {second}: leave {other} out, and the "
                f"split that {first} has is taken, or a part of it is held out"
            )
        if os.path.isabs(a) and os.path.isabs(b):
            outer, inner = sorted((a, b), key=len)
            if inner.startswith(outer.rstrip(os.sep) + os.sep):
                raise ValueError(f"{one}={first} and {other}={second}: one lies inside the other")


def place(spec: Any) -> str:
    """Return a name of a set that does not depend on how its path was written."""
    if not isinstance(spec, (str, Path)):
        return f"the object {id(spec)}"
    spec = str(spec)
    kind, colon, location = spec.partition(":")
    path = location if colon and kind in ("folder", "coco", "masks") else spec
    path = os.path.expanduser(path)
    return os.path.realpath(path) if os.path.isdir(path) else spec


def _check_labels(source: Source, labels_of: str) -> None:
    classes, name = source.classes, source.spec
    if classes is None:
        raise ValueError(f"{name} has no labels, which this job needs")
    _check_labels_of(source, labels_of)
    if labels_of == IMAGE and len(classes) < 2:
        raise ValueError(f"{name} has the class {classes[0]} alone: two are needed at least")


def _check_labels_of(source: Source, labels_of: str) -> None:
    if labels_of not in source.labels_of:
        held, needed = (
            " and ".join("whole images" if one == IMAGE else one for one in each)
            for each in (source.labels_of, (labels_of,))
        )
        raise ValueError(f"{source.spec} has labels of {held}; this job needs labels of {needed}")


def _check_classes(named: dict[str, Source | None]) -> None:
    training = named["training"]
    assert training is not None
    known = training.classes
    for name, source in named.items():
        if source is None or source.classes == known:
            continue
        if known is None or source.classes is None:
            raise ValueError(
                f"the training images of {training.spec} have "
                f"{'no' if known is None else len(known)} classes, the {name} images of "
                f"{source.spec} {'none' if source.classes is None else len(source.classes)}"
            )
        if known[: len(source.classes)] == source.classes:  # without an image of the last classes
            continue
        more = [one for one in source.classes if one not in known]
        if more:
            raise ValueError(
                f"the {name} images of {source.spec} have the class {more[0]}, which no training "
                f"image of {training.spec} has"
            )
        raise ValueError(
            f"the {name} images of {source.spec} have {len(source.classes)} classes in another "
            f"order than the {len(known)} of {training.spec}: they do not belong together"
        )


def _check_common(
    named: dict[str, Source | None], divided: bool, allowed: int
) -> dict[str, tuple[int, int]]:
    """Count the images that two splits share, and refuse more than are allowed."""
    found: dict[str, tuple[int, int]] = {}
    for (one, a), (other, b) in combinations(named.items(), 2):
        if a is None or b is None:
            continue
        if divided and (one, other) == ("training", "validation"):
            found[f"{one} and {other}"] = (0, len(b))  # copies of an image stay together
            continue
        pairs, compared = common_images(a, b)
        found[f"{one} and {other}"] = (len(pairs), compared)
        if compared < len(b):
            _log.info("%d of %d %s images were compared with %s", compared, len(b), other, one)
        if len(pairs) > allowed:
            first = pairs[0]
            raise ValueError(
                f"{len(pairs)} of {compared} {other} images are {one} images too, such as "
                f"{b.name(first[1])}, which is {a.name(first[0])}: take them out, or allow as many "
                f"with data.overlap={len(pairs)}"
            )
    return found
