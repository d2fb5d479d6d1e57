"""Scores of detectors and segmenters, and predictions as COCO files.

pycocotools computes the average precision, so that it compares with published tables. Masks are
kept as run lengths. Processes gather what they saw before anything is computed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from foveate.core.schedule import check_choice
from foveate.data import IGNORE
from foveate.data.rle import library
from foveate.dense.coco_results import numbers, runs

__all__ = ["AveragePrecision", "MeanIoU", "Scores"]

_IOU = {"box": "bbox", "mask": "segm"}
_MOST = 100  # detections of an image that count
# What pycocotools calls small, medium and large: below 32 x 32 pixels, below 96 x 96, the others.
_AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class Scores:
    """Average precision in 0..1; NaN where no object counts.

    Attributes:
        ap: mean over overlaps from 0.5 to 0.95.
        ap50: at an overlap of 0.5.
        ap75: at an overlap of 0.75.
        small: ``ap`` of objects below 32 x 32 pixels.
        medium: ``ap`` of those below 96 x 96.
        large: ``ap`` of the others.
        recall: average recall with 100 detections an image.
        per_class: ``ap`` of each class.
        images: number of images.
        objects: number of objects that count; crowds do not.
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float
    recall: float
    per_class: tuple[float, ...]
    images: int
    objects: int

    def sentence(self) -> str:
        """Return the scores in one line."""
        if not self.objects:
            return f"no objects in {self.images} images, so there is no average precision"
        sizes = ", ".join(
            f"{name} {100 * value:.1f}" if value == value else f"{name} no objects"
            for name in _AREAS[1:]
            for value in (getattr(self, name),)
        )
        return (
            f"AP {100 * self.ap:.1f}, AP50 {100 * self.ap50:.1f}, AP75 {100 * self.ap75:.1f} "
            f"({sizes}) of {self.objects} objects in {self.images} images"
        )


class AveragePrecision(Metric):
    """COCO's average precision over a data set, 0..1; NaN where it has no objects.

    After ``compute``, ``scores`` has it by size and by class.

    Args:
        kind: "box" or "mask".
        classes: number of classes.
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False

    images: list[Tensor]
    found: list[Tensor]
    found_runs: list[Tensor]
    true: list[Tensor]
    true_runs: list[Tensor]

    def __init__(self, kind: str, classes: int, **options: Any) -> None:
        super().__init__(**options)
        check_choice("kind", kind, [*_IOU])
        self.kind, self.classes = kind, classes
        self.scores: Scores | None = None
        # Columns of images: id, height, width; of found: image, class, score, box, bytes of the
        # mask; of true: image, class, crowd, area, box, bytes of the mask.
        for name in ("images", "found", "found_runs", "true", "true_runs"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add the predictions and targets of some images.

        Args:
            predictions: for each image "boxes" ``[n, 4]`` (left, top, right, bottom), "scores"
                ``[n]``, "labels" ``[n]`` from 0, and for masks "masks" ``[n, H, W]`` or
                ``[n, 1, H, W]``, in which values from 0.5 on count.
            targets: for each image the same without scores, in the same pixels, and "image_id";
                also "iscrowd" and "area" where they are known, as sources return them.
        """
        if len(predictions) != len(targets):
            raise ValueError(
                f"{len(predictions)} predictions were given for {len(targets)} images with targets"
            )
        for prediction, target in zip(predictions, targets, strict=True):
            self._add(prediction, target)

    def _add(self, prediction: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        needed = {"image_id", "boxes", "labels"} | ({"masks"} if self.kind == "mask" else set())
        for missing in sorted(needed - set(target)):
            raise ValueError(
                f"a target has no {missing!r}, which the average precision of a {self.kind} needs; "
                f"it has {', '.join(target)}"
            )
        number = float(int(target["image_id"]))
        if self.kind == "mask" and len(target["masks"]) and len(prediction["masks"]):
            here, there = (list(one["masks"].shape[-2:]) for one in (prediction, target))
            if here != there:  # pycocotools would never come back
                raise ValueError(
                    f"image {number:.0f} has predicted masks of {here} and target masks of "
                    f"{there}: both must have the same pixels"
                )
        boxes, labels = numbers(target["boxes"]).reshape(-1, 4), numbers(target["labels"])
        scores, classes = numbers(prediction["scores"]), numbers(prediction["labels"])
        for which, given in (("predicted", classes), ("target", labels)):
            if len(given) and not 0 <= given.min() <= given.max() < self.classes:
                wrong = given.min() if given.min() < 0 else given.max()
                raise ValueError(
                    f"image {number:.0f} has the {which} class {wrong:.0f}; classes lie in "
                    f"0..{self.classes - 1}"
                )
        extent = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        area = numbers(target["area"]) if "area" in target else extent
        crowd = numbers(target.get("iscrowd", torch.zeros(len(labels))))
        # Keep the best of each class: the others never count, and an untrained detector has many.
        order = np.argsort(-scores, kind="stable")
        rank = np.empty(len(order), dtype=int)
        for label in np.unique(classes):
            of_label = order[classes[order] == label]
            rank[of_label] = np.arange(len(of_label))
        best = np.sort(np.flatnonzero(rank < _MOST))
        scores, classes = scores[best], classes[best]
        found_boxes = numbers(prediction["boxes"]).reshape(-1, 4)[best]
        true_masks, found_masks = [b""] * len(labels), [b""] * len(scores)
        if self.kind == "mask":
            true_masks = runs(target["masks"])
            found_masks = runs(prediction["masks"][torch.from_numpy(best)])
            if "area" not in target:
                area = numbers(target["masks"].flatten(1).sum(1))
        size = _size(target)
        self.images.append(torch.tensor([[number, *size]], dtype=torch.float64))
        self.found.append(_table(number, classes, scores, found_boxes, found_masks))
        self.found_runs.append(_bytes(found_masks))
        self.true.append(_table(number, labels, crowd, area, boxes, true_masks))
        self.true_runs.append(_bytes(true_masks))

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Gather what all processes saw, which may be different numbers of images."""
        mine = {name: [one.cpu() for one in getattr(self, name)] for name in self._defaults}
        every: list[Any] = [None] * torch.distributed.get_world_size(process_group)
        torch.distributed.all_gather_object(every, mine, group=process_group)
        for name in self._defaults:
            setattr(self, name, [one for other in every for one in other[name]])

    def compute(self) -> Tensor:
        """Compute the average precision, and set ``scores``."""
        self.scores = self._scores()
        return torch.tensor(self.scores.ap, dtype=torch.float64)

    def _scores(self) -> Scores:
        nothing = torch.zeros(0, 3)
        images = _joined(self.images, nothing)
        _, first = np.unique(images[:, 0], return_index=True)
        if len(first) < len(images):
            twice = images[np.setdiff1d(np.arange(len(images)), first)[0], 0]
            raise ValueError(f"image {twice:.0f} was counted twice: ids of images must differ")
        true = _joined(self.true, torch.zeros(0, 9))
        found = _joined(self.found, torch.zeros(0, 8))
        objects = int((true[:, 2] == 0).sum()) if len(true) else 0
        if not objects:
            nan = float("nan")
            return Scores(*(nan,) * 7, (nan,) * self.classes, len(images), 0)
        sizes = {int(number): (int(h), int(w)) for number, h, w in images.tolist()}
        truth = _annotations(true, self.true_runs, sizes)
        for annotation, crowd, area in zip(
            truth, true[:, 2].tolist(), true[:, 3].tolist(), strict=True
        ):
            annotation |= {"iscrowd": int(crowd), "area": area}
        guesses = _annotations(found, self.found_runs, sizes)
        for annotation, score in zip(guesses, found[:, 2].tolist(), strict=True):
            annotation |= {"score": score, "iscrowd": 0}
            if self.kind == "mask":
                annotation["area"] = _area(annotation["segmentation"])
            else:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        precision, recall = _evaluated(self.kind, self.classes, sizes, truth, guesses)
        # precision: overlap, recall, class, size; recall: overlap, class, size.
        return Scores(
            ap=_mean(precision[..., 0]),
            ap50=_mean(precision[0, ..., 0]),
            ap75=_mean(precision[5, ..., 0]),
            small=_mean(precision[..., 1]),
            medium=_mean(precision[..., 2]),
            large=_mean(precision[..., 3]),
            recall=_mean(recall[..., 0]),
            per_class=tuple(_mean(precision[:, :, c, 0]) for c in range(self.classes)),
            images=len(images),
            objects=objects,
        )


def _size(target: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of the targets' pixels; 0 if only boxes are known."""
    if "masks" in target:
        height, width = target["masks"].shape[-2:]
        return int(height), int(width)
    return 0, 0


def _table(number: float, *columns: Any) -> Tensor:
    """Make a table of objects: the image, the given columns, and the bytes of each mask."""
    *values, masks = columns
    rows = len(masks)
    parts = [np.full((rows, 1), number)]
    parts += [one if one.ndim == 2 else one[:, None] for one in values]
    lengths = np.array([len(mask) for mask in masks], dtype=np.float64)[:, None]
    return torch.from_numpy(np.concatenate([*parts, lengths], axis=1))


def _bytes(parts: Sequence[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.uint8).copy())


def _joined(parts: Any, empty: Tensor) -> np.ndarray:
    parts = [parts] if isinstance(parts, Tensor) else list(parts)
    found: np.ndarray = torch.cat([one.cpu() for one in parts] or [empty]).numpy()
    return found


def _annotations(
    rows: np.ndarray, runs: Any, sizes: Mapping[int, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return objects in the form of pycocotools; ids begin at 1, since it reads 0 as no match."""
    content = _joined(runs, torch.zeros(0, dtype=torch.uint8)).tobytes()
    end, made = 0, []
    for own, row in enumerate(rows.tolist(), 1):
        start, end = end, end + int(row[-1])
        left, top, right, bottom = row[-5:-1]
        image = int(row[0])
        one: dict[str, Any] = {"id": own, "image_id": image, "category_id": int(row[1])}
        one["bbox"] = [left, top, right - left, bottom - top]
        if end > start:
            one["segmentation"] = {"size": list(sizes[image]), "counts": content[start:end]}
        made.append(one)
    return made


def _area(runs: dict[str, Any]) -> float:
    return float(library().area(runs))


def _evaluated(
    kind: str,
    classes: int,
    sizes: Mapping[int, tuple[int, int]],
    truth: list[dict[str, Any]],
    guesses: list[dict[str, Any]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return what pycocotools computes: precision and recall, -1 where there is no object.

    Precision is ``[overlaps, recalls, classes, sizes]``, recall ``[overlaps, classes, sizes]``.
    """
    library()  # its error says what to install
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        sides = []
        for annotations in (truth, guesses):
            side = COCO()
            side.dataset = {
                "images": [{"id": i, "height": h, "width": w} for i, (h, w) in sizes.items()],
                "annotations": annotations,
                "categories": [{"id": one} for one in range(classes)],
            }
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, iouType=_IOU[kind])
        evaluation.params.imgIds = sorted(sizes)
        evaluation.params.maxDets = [1, 10, _MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if len(known) else float("nan")


class MeanIoU(MulticlassJaccardIndex):
    """Mean over classes of intersection over union, each over the whole data set, 0..1.

    A class that occurs in neither labels nor predictions does not count; the mean is NaN if no
    pixel counts. After ``compute``, ``per_class`` has each class, NaN for one that does not occur.

    Args:
        classes: number of classes.
        ignore: label of pixels that have no class.
    """

    def __init__(self, classes: int, ignore: int = IGNORE, **options: Any) -> None:
        super().__init__(
            classes, average="none", ignore_index=ignore, validate_args=False, **options
        )
        self.per_class: tuple[float, ...] = ()

    def compute(self) -> Tensor:
        """Compute the mean."""
        counts = self.confmat.double()
        both = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - both
        each = both / union  # NaN where a class does not occur
        self.per_class = tuple(each.tolist())
        return each.nanmean()
