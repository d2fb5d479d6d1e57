"""Annotation files of COCO: objects with boxes, polygons or run lengths, as a few arrays.

A million objects as dictionaries take gigabytes, and each worker process would copy them as it
counts its references. So an annotation is packed while the file is read, and arrays are shared.
Annotations that cannot be used are left out, counted and named; a contradiction raises one
sentence.
"""

from __future__ import annotations

import json
import logging
import math
import reprlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.rle import decode, mask_box, pack, rasterise, run_lengths
from foveate.data.sources.base import PackedNames

__all__ = ["CocoFile", "LeftOut", "read_coco"]

_log = logging.getLogger(__name__)
_NOTHING, _POLYGONS, _RUNS = range(3)  # what an object's mask is stored as
_PACKED = object()  # stands where an annotation was, once it is packed
_FARTHEST = 10**6  # pixels; polygons are filled in time and memory that grow with their extent


@dataclass
class LeftOut:
    """What was left out when a set was opened, counted by reason, with the first example."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count one more."""
        count, first = self.reasons.get(reason, (0, example))
        self.reasons[reason] = count + 1, first

    def sentence(self) -> str:
        """Return what was left out and why; empty if nothing was."""
        return "; ".join(
            f"{count} {reason} (the first: {first})"
            for reason, (count, first) in self.reasons.items()
        )


@dataclass(frozen=True)
class CocoFile:
    """The content of an annotation file.

    Objects are in the order of their images: those of image ``i`` are
    ``starts[i]`` to ``starts[i + 1]``.

    Attributes:
        path: the file.
        image_ids: int64 ``[I]``.
        image_names: of each image's file, as the annotation file has it.
        image_sizes: height and width of each image ``[I, 2]``.
        classes: names of the categories in the order of their ids.
        category_ids: those ids, which may have holes.
        starts: int64 ``[I + 1]``.
        ids: of each object ``[A]``.
        labels: of each object, from 0 without holes ``[A]``.
        boxes: left, top, right, bottom within the image, float64 ``[A, 4]``.
        areas: as the file has them, float64 ``[A]``.
        crowds: whether an object is a crowd ``[A]``.
        kinds: what each mask is stored as ``[A]``; 0 for objects without one.
        block: all masks one after another, as bytes.
        ends: where each mask ends in the block, int64 ``[A]``.
        left_out: annotations that could not be used.
    """

    path: str
    image_ids: np.ndarray
    image_names: PackedNames
    image_sizes: np.ndarray
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    starts: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    kinds: np.ndarray
    block: np.ndarray
    ends: np.ndarray
    left_out: LeftOut

    def mask(self, number: int, height: int, width: int) -> np.ndarray:
        """Decode the mask ``[H, W]`` uint8 of an object."""
        start = self.ends[number - 1] if number else 0
        stored = self.block[start : self.ends[number]]
        return _decoded(int(self.kinds[number]), stored, height, width)


def read_coco(path: Path) -> CocoFile:
    """Read an annotation file; ValueError with one sentence if it is not one."""
    packer = _Packer()
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=packer.take)
    except FileNotFoundError:
        raise ValueError(f"there is no annotation file {path}") from None
    except _BadId as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError as error:  # of JSON, of its encoding, or of a number with too many digits
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} has lists in lists, deeper than any COCO file has them") from None
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "a single entry"
        raise ValueError(
            f"{path} holds {kind}, such as predictions are; a COCO file is an object with images, "
            "annotations and categories"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(
                f"{path} has no list of {key}: a COCO file of objects has images, annotations and "
                "categories"
            )
    left_out = LeftOut()
    # What the packer did not know as an annotation is still here.
    for other in content["annotations"]:
        if other is _PACKED:
            continue
        if isinstance(other, dict) and "segments_info" in other:
            raise ValueError(f"{path} is a panoptic file; one with an object an annotation is read")
        which = reprlib.repr(other)
        left_out.add("annotations without an image_id, or without box and mask", which)
    image_ids, names, sizes = _images(path, content["images"])
    classes, category_ids = _categories(path, content["categories"])
    return _checked(path, packer, image_ids, names, sizes, classes, category_ids, left_out)


class _BadId(ValueError):
    """An id that is not a whole number."""


class _Packer:
    """Pack each annotation into numbers and bytes while the file is read."""

    def __init__(self) -> None:
        # id, id of the image, id of the category, crowd, kind of mask, end of mask
        self.numbers = array("q")
        self.floats = array("d")  # left, top, width, height, area; NaN where there is none
        self.block = bytearray()
        self.wrong: dict[int, str] = {}  # number of an annotation: what is wrong with its mask

    def take(self, found: dict[str, Any]) -> Any:
        """Keep an annotation and give ``_PACKED``; give back any other dictionary."""
        if "image_id" not in found or not ("bbox" in found or "segmentation" in found):
            return found
        count = len(self.numbers) // 6
        own = _whole(found.get("id", count), "id of annotation", count)
        image = _whole(found["image_id"], "image_id of annotation", own)
        category = _whole(found.get("category_id"), "category_id of annotation", own)
        kind, mask = _NOTHING, b""
        try:
            kind, mask = _packed(found.get("segmentation"))
        except ValueError as error:
            self.wrong[count] = str(error)
        self.block += mask
        crowd = int(bool(found.get("iscrowd", 0)))
        self.numbers.extend((own, image, category, crowd, kind, len(self.block)))
        self.floats.extend((*_box(found.get("bbox")), _number(found.get("area"))))
        return _PACKED


def _whole(value: Any, what: str, which: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise _BadId(f"the {what} {which} is {value!r}; ids are whole numbers")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number of more digits than a float has
        return math.inf


def _box(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 4:
        return (math.nan,) * 4
    return tuple(map(_number, value))


def _packed(segmentation: Any) -> tuple[int, bytes]:
    """Kind and bytes of a mask; ValueError says what is wrong with it."""
    if segmentation in (None, []):
        return _NOTHING, b""
    if isinstance(segmentation, list):
        values = array("d", [len(segmentation)])
        values.extend(len(part) if isinstance(part, list) else 0 for part in segmentation)
        for part in segmentation:
            if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
                points = len(part) // 2 if isinstance(part, list) else 0
                raise ValueError(f"a polygon has {points} points and needs 3")
            try:
                values.extend(part)
            except TypeError:
                raise ValueError("a polygon has points that are not numbers") from None
            except OverflowError:
                raise ValueError("a polygon has points that are not finite") from None
        if not math.isfinite(sum(values)):
            raise ValueError("a polygon has points that are not finite")
        coordinates = values[1 + len(segmentation) :]
        farthest = max(coordinates, key=abs)
        if abs(farthest) > _FARTHEST:
            raise ValueError(f"a polygon has the coordinate {farthest:g}, far outside any image")
        return _POLYGONS, values.tobytes()
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError("a mask must be a list of polygons, or run lengths with size and counts")
    size, counts = segmentation["size"], segmentation["counts"]
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(isinstance(n, int) and 0 < n < 2**31 for n in size)
    ):
        raise ValueError(f"the size of run lengths must be a height and a width, got {size!r}")
    if isinstance(counts, list):
        if not counts or not all(isinstance(n, int) and 0 <= n < 2**32 for n in counts):
            raise ValueError(f"run lengths must be whole numbers from 0 to {2**32 - 1}")
        counts = pack(counts).decode("ascii")
    if not isinstance(counts, str):
        raise ValueError("run lengths must be a list or a string")
    packed = counts.encode("utf-8")
    total = int(run_lengths(packed).sum())
    if total != size[0] * size[1]:
        raise ValueError(f"its run lengths add up to {total} pixels, its size is {size}")
    return _RUNS, np.array(size, dtype="<i4").tobytes() + packed


def _decoded(kind: int, stored: np.ndarray, height: int, width: int) -> np.ndarray:
    content = stored.tobytes()
    if kind == _RUNS:
        return decode(run_lengths(content[8:]), height, width)
    assert kind == _POLYGONS
    values = np.frombuffer(content, dtype=np.float64)
    count = int(values[0])
    cuts = np.cumsum(values[1 : count + 1].astype(int))
    return rasterise(np.split(values[count + 1 :], cuts[:-1]), height, width)


def _images(path: Path, entries: list[Any]) -> tuple[np.ndarray, list[str], np.ndarray]:
    ids, names, sizes = array("q"), [], array("q")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "id" not in entry:
            raise ValueError(f"{path}: image {number} of the list has no id")
        try:
            ids.append(_whole(entry["id"], "id of image", number))
        except _BadId as error:
            raise ValueError(f"{path}: {error}") from None
        name = entry.get("file_name")
        size: tuple[Any, Any] = entry.get("height"), entry.get("width")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}: image {ids[-1]} has no file_name")
        if not all(isinstance(side, int) and 0 < side < 2**31 for side in size):
            raise ValueError(
                f"{path}: image {ids[-1]} needs a height and a width in pixels, got {size}"
            )
        names.append(name)
        sizes.extend(size)
    found = np.array(ids, dtype=np.int64)
    unique, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{path} has several images with the id {unique[counts > 1][0]}")
    if not len(found):
        raise ValueError(f"{path} has no images")
    return found, names, np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _categories(path: Path, entries: list[Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names: dict[int, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "id" not in entry:
            raise ValueError(f"{path}: category {number} of the list has no id")
        try:
            own = _whole(entry["id"], "id of category", number)
        except _BadId as error:
            raise ValueError(f"{path}: {error}") from None
        if own in names:
            raise ValueError(f"{path} has several categories with the id {own}")
        names[own] = str(entry.get("name", own))
    if not names:
        raise ValueError(f"{path} has no categories")
    order = sorted(names)
    return tuple(names[own] for own in order), tuple(order)


def _checked(
    path: Path,
    packer: _Packer,
    image_ids: np.ndarray,
    names: list[str],
    sizes: np.ndarray,
    classes: tuple[str, ...],
    category_ids: tuple[int, ...],
    left_out: LeftOut,
) -> CocoFile:
    """Leave out the annotations that cannot be used, and put the others in order."""
    numbers = np.array(packer.numbers, dtype=np.int64).reshape(-1, 6)
    floats = np.array(packer.floats, dtype=np.float64).reshape(-1, 5)
    block = np.frombuffer(bytes(packer.block), dtype=np.uint8)
    ids, of, categories, crowds, kinds, ends = numbers.T.copy()
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    image, known_image = _places(image_ids, of)
    label, known_label = _places(np.array(category_ids), categories)
    keep = known_image & known_label
    for i in np.flatnonzero(~known_image).tolist():
        left_out.add("annotations of images that are not listed", f"{ids[i]} of image {of[i]}")
    for i in np.flatnonzero(known_image & ~known_label).tolist():
        left_out.add("annotations of an unknown category", f"{ids[i]}, category {categories[i]}")

    def mask_of(i: int) -> np.ndarray:
        return _decoded(int(kinds[i]), block[begins[i] : ends[i]], *sizes[image[i]].tolist())

    for i in np.flatnonzero(keep & (kinds == _RUNS)).tolist():
        size = block[begins[i] : begins[i] + 8].view("<i4").tolist()
        if size != sizes[image[i]].tolist():
            kinds[i] = _NOTHING
            packer.wrong[i] = f"its run lengths are of {size}, its image {sizes[image[i]].tolist()}"
    for i, reason in packer.wrong.items():
        if keep[i]:
            left_out.add("masks that cannot be used", f"annotation {ids[i]}: {reason}")

    boxes = floats[:, :4].copy()
    boxes[:, 2:] += boxes[:, :2]
    for i in np.flatnonzero(keep & ~np.isfinite(boxes).all(1) & (kinds != _NOTHING)).tolist():
        boxes[i] = mask_box(mask_of(i)) or (math.nan,) * 4  # some files have masks alone
    limits = np.zeros((len(ids), 2), dtype=np.int64)
    limits[keep] = sizes[image[keep], ::-1]
    cut = np.clip(boxes, 0, np.tile(limits, 2)) if len(boxes) else boxes
    extent = cut[:, 2:] - cut[:, :2]
    usable = np.isfinite(boxes).all(1) & (extent > 0).all(1)
    for i in np.flatnonzero(keep & ~usable).tolist():
        given = floats[i, :4].tolist()
        which = "outside their image" if (floats[i, 2:4] > 0).all() else "without an area"
        if not np.isfinite(floats[i, :4]).all():
            which = "that are not four finite numbers"
        left_out.add(f"boxes {which}", f"annotation {ids[i]}, {given}")
    far = keep & usable & (np.abs(cut - boxes) > 1).any(1)
    if far.any():
        first = int(np.flatnonzero(far)[0])
        _log.warning(
            "%s: %d boxes reach out of their image and were cut at its border, the first of "
            "annotation %d, %s",
            path,
            far.sum(),
            ids[first],
            floats[first, :4].tolist(),
        )
    keep &= usable
    bare = keep & (kinds == _NOTHING)
    if (keep & ~bare).any():  # with masks, samples have no other objects
        bare[list(packer.wrong)] = False  # counted above
        for i in np.flatnonzero(bare).tolist():
            reason = "objects without a mask, used where boxes alone are asked for"
            left_out.add(reason, f"annotation {ids[i]}")

    if not keep.any() and left_out.reasons:
        raise ValueError(f"{path} has no annotation that can be used: {left_out.sentence()}")
    order = np.flatnonzero(keep)
    order = order[np.argsort(image[order], kind="stable")]
    lengths = np.where(kinds[order] == _NOTHING, 0, ends[order] - begins[order])
    areas = floats[order, 4]
    unknown = ~(np.isfinite(areas) & (areas > 0))  # without one, that of the box
    areas[unknown] = extent[order[unknown]].prod(1)
    return CocoFile(
        path=str(path),
        image_ids=image_ids,
        image_names=PackedNames(names),
        image_sizes=sizes,
        classes=classes,
        category_ids=category_ids,
        starts=np.searchsorted(image[order], np.arange(len(image_ids) + 1)),
        ids=ids[order],
        labels=label[order],
        boxes=cut[order],
        areas=areas,
        crowds=crowds[order].astype(bool),
        kinds=kinds[order].astype(np.uint8),
        block=_gathered(block, begins[order], lengths),
        ends=np.cumsum(lengths),
        left_out=left_out,
    )


def _places(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each id among the known ones, and whether it is known."""
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known, asked, sorter=order)
    place = order[np.minimum(place, len(known) - 1)]
    return place, known[place] == asked


def _gathered(block: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Put pieces of a block in another order, one after another."""
    ends = np.cumsum(lengths)
    found = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for begin, end, length in zip(begins.tolist(), ends.tolist(), lengths.tolist(), strict=True):
        found[end - length : end] = block[begin : begin + length]
    return found
