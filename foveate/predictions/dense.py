"""Predict objects or classes of pixels for images of any size, with a detector or a segmenter."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from foveate.core import Trace
from foveate.core.evaluation import answering
from foveate.data import ImageFiles
from foveate.dense import DenseModel, Segmenter
from foveate.dense.coco_results import coco_predictions
from foveate.files import FreeNames, write_text, write_whole
from foveate.predictions.classify import Images, named_images, opened
from foveate.viz import found_objects, found_pixels
from foveate.viz.dense import trace_dense
from foveate.viz.grid import Box

__all__ = ["DensePrediction", "DensePredictions", "predict_and_draw", "predict_dense"]


@dataclass(frozen=True)
class DensePrediction:
    """What was found in one image.

    Attributes:
        image: path of the image, or "image N" for a PIL image.
        size: height and width in pixels, as the file stores them.
        classes: class number of each object; for a segmenter the classes that occur, the one with
            the largest area first.
        scores: confidence of each object; for a segmenter each class's share of the pixels.
        objects: the objects as entries of COCO's format; empty for a segmenter.
        usage: share of the patches that the blocks worked on; None without a method.
    """

    image: str
    size: tuple[int, int]
    classes: tuple[int, ...]
    scores: tuple[float, ...]
    objects: tuple[dict[str, Any], ...]
    usage: float | None


@dataclass(frozen=True)
class DensePredictions(Sequence[DensePrediction]):
    """Predictions for several images, in their order.

    Attributes:
        model: name of the model, or its class.
        class_names: names of its classes; "class N" where the model has none.
        records: one prediction for each image.
        unreadable: files that were skipped, with the reasons.
    """

    model: str
    class_names: tuple[str, ...]
    records: tuple[DensePrediction, ...]
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def coco(self, path: str | os.PathLike[str]) -> None:
        """Write images, categories and found objects in COCO's format, with ids from 1.

        Boxes are left, top, width and height in pixels; masks are run-length encoded.
        """
        objects = [one for record in self.records for one in record.objects]
        content = {
            "images": [
                {"id": n, "file_name": one.image, "height": one.size[0], "width": one.size[1]}
                for n, one in enumerate(self.records, 1)
            ],
            "categories": [{"id": n, "name": name} for n, name in enumerate(self.class_names, 1)],
            "annotations": [{"id": n, "iscrowd": 0, **one} for n, one in enumerate(objects, 1)],
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


@torch.no_grad()
def predict_dense(
    model: DenseModel | str | os.PathLike[str],
    images: Images,
    *,
    pictures: str | os.PathLike[str] | None = None,
    maps: str | os.PathLike[str] | None = None,
    least: float = 0.5,
    batch: int = 1,
    device: str = "auto",
    precision: str = "fp32",
    strict: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> DensePredictions:
    """Find the objects in images, or a class for each of their pixels.

    The model sees files upright, as their EXIF data say, and pictures show them so. Boxes, masks
    and label maps are in the pixels as the file stores them, where annotations are.

    Args:
        model: a detector or a segmenter, or the file or folder of one.
        images: paths of files and folders, or PIL images.
        pictures: folder for one picture of each image: what was found, and for a model with a
            method how many blocks worked on each patch.
        maps: folder for one label map of each image as PNG, from a segmenter.
        least: lowest score of an object that is drawn.
        batch: number of images in a forward pass.
        device: "cpu" or "cuda". "auto" leaves a given model where it is, and opens others on a GPU
            if there is one.
        precision: "fp32", or "bf16" for automatic mixed precision.
        strict: raise an error for the first file that cannot be read, instead of skipping it.
        progress: called with the number of images done and the number of all.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a whole number from 1, got {batch!r}")
    _check_least(least)
    named, count = named_images(images, strict)
    found, title, place = opened(model, device)
    if not isinstance(found, DenseModel):
        raise ValueError(f"{title} is neither a detector nor a segmenter: use foveate.predict")
    if maps is not None and not isinstance(found, Segmenter):
        raise ValueError(
            f"{title} is a detector, which gives no label maps: leave maps out; the result's coco "
            "method writes the objects"
        )
    model = found if place is None else found.to(place)
    folders = [None if one is None else Path(one) for one in (pictures, maps)]
    for folder in filter(None, folders):
        folder.mkdir(parents=True, exist_ok=True)
    names = FreeNames()
    records: list[DensePrediction] = []
    stream: Iterator[tuple[str | Path, Image.Image]] = iter(named)
    with answering(model, precision=precision):
        while some := list(islice(stream, batch)):
            answers = model([model.pixels(image) for _, image in some])
            for (name, image), answer in zip(some, answers, strict=True):
                seen = _seen(model, image)
                stored, size = _as_stored(answer, image, _turn(name))
                record = _record(str(name), size, stored, seen, len(records) + 1)
                records.append(record)
                file = names.free(Path(str(name)).stem)
                if folders[0] is not None:
                    drawn = _picture(model, image, record, answer, seen, least)
                    _save(drawn, folders[0] / f"{file}.png")
                if folders[1] is not None:
                    kind = np.uint8 if model.num_classes <= 256 else np.uint16
                    drawn = Image.fromarray(stored.cpu().numpy().astype(kind))
                    _save(drawn, folders[1] / f"{file}.png")
            if progress is not None:
                progress(len(records), count)
    broken = named.broken if isinstance(named, ImageFiles) else {}
    unreadable = {str(path): why for path, why in broken.items()}
    return DensePredictions(title, model.display_names, tuple(records), unreadable)


def predict_and_draw(
    model: DenseModel, image: Image.Image, name: str, *, least: float = 0.5
) -> tuple[DensePrediction, Image.Image]:
    """Do what ``predict_dense`` does for one RGB image; return the prediction and its picture.

    Args:
        model: a detector or a segmenter.
        image: the image.
        name: name of the image, for the prediction and the title of the picture.
        least: lowest score of an object that is drawn.
    """
    _check_least(least)
    with answering(model):
        (answer,) = model([model.pixels(image)])
        seen = _seen(model, image)
        record = _record(name, (image.height, image.width), answer, seen, 1)
        return record, _picture(model, image, record, answer, seen, least)


def _check_least(least: float) -> None:
    if not 0 <= least <= 1:
        raise ValueError(f"least must lie in [0, 1], got {least}")


def _seen(model: DenseModel, image: Image.Image) -> tuple[Trace, Box] | None:
    """Return the trace of an image and the part of it that the model saw; None without a method."""
    return None if model.reducer.name == "dense" else trace_dense(model, image)


def _turn(name: str | Path) -> int:
    """Return how EXIF says that the pixels of a file are turned, from 1 to 8; 1 is upright."""
    if isinstance(name, str):  # not a file, and not turned when it was read
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes, as where it was read
            with Image.open(name) as file:
                turn = file.getexif().get(ExifTags.Base.Orientation, 1)
                # Pillow itself turns TIFF files, for whoever reads annotations too.
                return turn if turn in range(1, 9) and file.format != "TIFF" else 1
    except Exception:  # damaged EXIF data, which turned nothing, or too large but for shrinking
        return 1


def _as_stored(answer: Any, image: Image.Image, turn: int) -> tuple[Any, tuple[int, int]]:
    """Turn the answer to an upright image back as its file is; return it with height and width."""
    height, width = image.height, image.width
    if turn == 1:
        return answer, (height, width)
    swap, across, down = turn in (5, 6, 7, 8), turn in (2, 3, 7, 8), turn in (3, 4, 6, 7)
    if swap:
        height, width = width, height

    def turned(maps: Tensor) -> Tensor:
        maps = maps.mT if swap else maps
        return maps.flip([axis for axis, flipped in ((-1, across), (-2, down)) if flipped])

    if isinstance(answer, Tensor):
        return turned(answer), (height, width)
    left, top, right, bottom = answer["boxes"].unbind(1)
    if swap:
        left, top, right, bottom = top, left, bottom, right
    if across:
        left, right = width - right, width - left
    if down:
        top, bottom = height - bottom, height - top
    stored = {**answer, "boxes": torch.stack((left, top, right, bottom), 1)}
    if "masks" in answer:
        # Thresholded as they are when they are written: floats take four times the memory.
        stored["masks"] = turned(answer["masks"] >= 0.5)
    return stored, (height, width)


def _record(
    name: str, size: tuple[int, int], answer: Any, seen: tuple[Trace, Box] | None, number: int
) -> DensePrediction:
    usage = None
    if seen is not None:
        trace, _ = seen
        usage = float(trace.depth().float().mean()) / len(trace.blocks)
    if isinstance(answer, Tensor):
        found, counts = answer.unique(return_counts=True)
        order = counts.argsort(descending=True)
        shares = (counts[order] / answer.numel()).tolist()
        return DensePrediction(name, size, tuple(found[order].tolist()), tuple(shares), (), usage)
    if not bool(answer["scores"].isfinite().all()):
        raise ValueError(f"{name}: the answers contain NaN or infinity: the weights are broken")
    entries = coco_predictions([{**answer, "image_id": number}], None)
    for entry in entries:
        entry["category_id"] += 1
    return DensePrediction(
        name,
        size,
        tuple(answer["labels"].tolist()),
        tuple(answer["scores"].tolist()),
        tuple(entries),
        usage,
    )


def _picture(
    model: DenseModel,
    image: Image.Image,
    record: DensePrediction,
    answer: Any,
    seen: tuple[Trace, Box] | None,
    least: float,
) -> Image.Image:
    trace, box = seen or (None, None)
    title = [Path(record.image).name, *([] if trace is None else [repr(model.reducer)])]
    names = model.display_names
    given: dict[str, Any] = {"title": title, "trace": trace, "box": box}
    if isinstance(answer, Tensor):
        return found_pixels(image, answer.cpu(), names, **given)
    answer = {key: value.cpu() for key, value in answer.items()}
    return found_objects(image, answer, names, least=least, **given)


def _save(image: Image.Image, path: Path) -> None:
    write_whole(path, lambda partial: image.save(partial, format="png"))
