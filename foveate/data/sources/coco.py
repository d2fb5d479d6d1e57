"""Images with objects in COCO's format: a JSON file and a folder of images."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from foveate.data.images import Unreadable, read_image
from foveate.data.sources.base import (
    NAMES,
    OBJECTS,
    SPLITS,
    WHOLE,
    FileSource,
    NoSplit,
    PackedNames,
    Tell,
    check_cut,
)
from foveate.data.sources.coco_json import CocoFile, LeftOut, read_coco

__all__ = ["CocoSource", "object_targets", "open_coco"]

_log = logging.getLogger(__name__)
_ROBOFLOW = "_annotations.coco.json"  # beside the images of its split


@dataclass(frozen=True)
class CocoSource(FileSource):
    """Images and their objects; see ``Source``.

    Attributes:
        files: paths of the images.
        rows: where each image stands in the annotation file.
        annotations: content of that file; None without labels.
        masks: whether targets have masks, decoded image by image; they have no other objects then.
        left_out: what could not be used, and why.
    """

    spec: str
    split: str
    files: PackedNames
    rows: np.ndarray
    annotations: CocoFile | None
    masks: bool
    left_out: LeftOut
    classes: tuple[str, ...] | None
    category_ids: tuple[int, ...] | None
    channels: int = 3
    labels_of: tuple[str, ...] = (OBJECTS,)

    def image(self, index: int) -> Image.Image:
        """Read the image without turning it by EXIF, because boxes are not turned either."""
        image = read_image(self.files[index], stored=True)
        if self.annotations is not None:
            height, width = self.annotations.image_sizes[self.rows[index]].tolist()
            if image.size != (width, height):
                turned = (
                    "; boxes are in the pixels of the file, whatever its EXIF says"
                    if image.size == (height, width)
                    else ""
                )
                raise Unreadable(
                    f"{self.files[index]} is {image.width} x {image.height} pixels, and "
                    f"{self.annotations.path} says {width} x {height}{turned}"
                )
        return image

    def targets(self, index: int) -> dict[str, Any]:
        """Give the objects of an image; see ``object_targets``."""
        known = self.annotations
        if known is None:
            return {}
        row = int(self.rows[index])
        height, width = known.image_sizes[row].tolist()
        numbers = np.arange(known.starts[row], known.starts[row + 1])
        masks = None
        if self.masks:
            numbers = numbers[known.kinds[numbers] > 0]
            masks = np.zeros((len(numbers), height, width), dtype=np.uint8)
            for place, number in enumerate(numbers.tolist()):
                masks[place] = known.mask(number, height, width)
        return object_targets(
            boxes=known.boxes[numbers],
            labels=known.labels[numbers],
            areas=known.areas[numbers],
            crowds=known.crowds[numbers],
            masks=masks,
            size=(height, width),
            image_id=int(known.image_ids[row]),
        )

    def boxes_only(self) -> CocoSource:
        return dataclasses.replace(self, masks=False)

    def class_counts(self, tell: Tell = iter) -> np.ndarray:
        known = self.annotations
        assert known is not None
        present = np.isin(np.arange(len(known.image_ids)), self.rows)
        held = np.repeat(present, np.diff(known.starts))
        if self.masks:
            held &= known.kinds > 0  # as targets have them
        return np.bincount(known.labels[held], minlength=len(known.classes))


def object_targets(
    *,
    boxes: np.ndarray,
    labels: np.ndarray,
    areas: np.ndarray,
    crowds: np.ndarray,
    masks: np.ndarray | None,
    size: tuple[int, int],
    image_id: int,
) -> dict[str, Any]:
    """Build the targets of an image for transforms and detectors.

    They are "boxes" ``[N, 4]`` (left, top, right, bottom), "labels" ``[N]`` from 0, "area" ``[N]``
    in pixels, "iscrowd" ``[N]``, "image_id" and, where there are any, "masks" ``[N, H, W]`` uint8.
    """
    floats = torch.from_numpy(np.ascontiguousarray(boxes, dtype=np.float32)).reshape(-1, 4)
    found: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(floats, format="XYXY", canvas_size=size),
        "labels": torch.from_numpy(labels.astype(np.int64)),
        "area": torch.from_numpy(areas.astype(np.float32)),
        "iscrowd": torch.from_numpy(crowds.astype(np.int64)),
        "image_id": image_id,
    }
    if masks is not None:
        found["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
    return found


def open_coco(spec: str, location: str, split: str, labels: bool) -> CocoSource:
    """Open a folder with the usual layout, or ``FILE.json:FOLDER`` of annotations and images.

    Usual are ``annotations/instances_train2017.json`` with ``train2017`` or ``images/train2017``,
    the same without a year or without the folder "annotations", and
    ``train/_annotations.coco.json`` beside its images. In the other form ``{split}`` stands for
    "train", "val" or "test"; without it all images are one set.
    """
    file, images = _located(spec, location, split)
    if not images.is_dir():
        raise ValueError(f"{images}, where the images of {file} should be, is not a folder")
    known = read_coco(file)
    left_out = dataclasses.replace(known.left_out, reasons=dict(known.left_out.reasons))
    paths = [os.path.join(images, known.image_names[i]) for i in range(len(known.image_ids))]
    rows = []
    for row, path in enumerate(paths):
        if os.path.isfile(path):
            rows.append(row)
        else:
            which = f"image {known.image_ids[row]}, {known.image_names[row]}"
            left_out.add(f"images that {images} does not hold", which)
    if not rows:
        raise ValueError(f"{images} holds none of the {len(paths)} images of {file}")
    source = CocoSource(
        spec=spec,
        split=split,
        files=PackedNames(paths[row] for row in rows),
        rows=np.array(rows),
        annotations=known if labels else None,
        masks=bool((known.kinds > 0).any()),
        classes=known.classes if labels else None,
        category_ids=known.category_ids if labels else None,
        left_out=left_out,
    )
    held = f"{len(rows)} images"
    if labels:
        held += f", {source.class_counts().sum()} objects of {len(known.classes)} classes"
    if left_out.reasons:
        _log.warning("%s: %s; left out: %s", file, held, left_out.sentence())
    else:
        _log.info("%s: %s", file, held)
    return source


def _located(spec: str, location: str, split: str) -> tuple[Path, Path]:
    """Return the annotation file of a split and the folder of its images."""
    named = re.fullmatch(r"(.+\.json):(.+)", location, flags=re.IGNORECASE)
    if named:
        check_cut(spec, location, split)
        file, images = (
            Path(part.replace("{split}", split)).expanduser() for part in named.groups()
        )
        others = [one for one in SPLITS if one not in (split, WHOLE)]
        if not file.exists() and any(
            Path(named[1].replace("{split}", one)).expanduser().exists() for one in others
        ):
            raise NoSplit(f"there is no annotation file {file}, for the split {split!r}")
        return file, images
    if location.lower().endswith(".json"):
        raise ValueError(f"{spec!r} names no folder of images: it is coco:FILE.json:FOLDER")
    root = Path(location).expanduser()
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {kind}; a folder as COCO has it is needed")
    found = {one: places for one in NAMES if (places := _candidates(root, one))}
    if not found:
        raise ValueError(
            f"{root} holds no annotations/instances_train*.json or the like; coco:FILE.json:FOLDER "
            "names the annotations and the folder of images"
        )
    if split not in found:
        raise NoSplit(f"{root} has the splits {', '.join(found)}, and no {split}")
    if len(found[split]) > 1:
        several = ", ".join(str(file.relative_to(root)) for file, _ in found[split])
        raise ValueError(
            f"{root} holds several annotation files of the split {split!r}, {several}: name one "
            "with its images as coco:FILE.json:FOLDER"
        )
    return found[split][0]


def _candidates(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Return possible annotation files of a split, each with the folder of its images."""
    found = []
    for name in NAMES[split]:
        for folder in (root / "annotations", root):
            for file in sorted(folder.glob(f"instances_{name}*.json")):
                year = re.fullmatch(rf"instances_{name}(\d*)\.json", file.name)
                if year:
                    found.append((file, _images_of(root, name, year[1])))
        if (root / name / _ROBOFLOW).is_file():
            found.append((root / name / _ROBOFLOW, root / name))
    return found


def _images_of(root: Path, name: str, year: str) -> Path:
    places = [root / f"{name}{year}", root / "images" / f"{name}{year}"]
    places += [root / name, root / "images" / name, root / "images"]
    return next((place for place in places if place.is_dir()), places[0])
