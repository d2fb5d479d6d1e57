"""Scores: pycocotools' own numbers, whatever ids, crowds and processes there are."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from foveate.data import IGNORE, open_source
from foveate.data.rle import encode
from foveate.data.sources import CocoSource
from foveate.dense.coco_results import coco_predictions, write_predictions
from foveate.dense.metrics import AveragePrecision, MeanIoU

SIZE = (120, 160)
ONE = pytest.approx(1.0, abs=1e-12)  # pycocotools adds an epsilon below each ratio


def rectangle(draw: np.random.RandomState) -> list[int]:
    height, width = np.exp(draw.uniform(np.log(8), np.log(SIZE[0] - 1), 2)).astype(int)
    top, left = draw.randint(0, SIZE[0] - height), draw.randint(0, SIZE[1] - width)
    return [left, top, left + width, top + height]


def filled(boxes: Any) -> Tensor:
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    return masks


def truth(images: int = 12, seed: int = 0, classes: int = 3) -> list[dict[str, Any]]:
    """Objects of all sizes; every fourth image has none, and some are crowds."""
    draw, made = np.random.RandomState(seed), []
    for number in range(images):
        count = 0 if number % 4 == 2 else draw.randint(1, 6)
        boxes = torch.tensor([rectangle(draw) for _ in range(count)]).reshape(-1, 4).float()
        made.append(
            {
                "image_id": number,
                "boxes": boxes,
                "labels": torch.from_numpy(draw.randint(0, classes, count)),
                "iscrowd": torch.from_numpy((draw.rand(count) < 0.15).astype(np.int64)),
                "masks": filled(boxes),
            }
        )
        made[-1]["area"] = made[-1]["masks"].flatten(1).sum(1).float()
    return made


def perfect(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for target in targets:
        single = target["iscrowd"] == 0
        one = {key: target[key][single] for key in ("boxes", "labels", "masks")}
        made.append(
            {**one, "image_id": target["image_id"], "scores": torch.ones(int(single.sum()))}
        )
    return made


def poor(targets: list[dict[str, Any]], seed: int = 1) -> list[dict[str, Any]]:
    """Shifted objects, some of another class, some invented, in images without any too."""
    draw, made = np.random.RandomState(seed), []
    for target in targets:
        boxes = [*target["boxes"].tolist(), *(rectangle(draw) for _ in range(draw.randint(0, 3)))]
        shifted = torch.tensor(boxes).reshape(-1, 4).float()
        shifted += torch.from_numpy(draw.randint(-4, 5, (len(boxes), 4))).float()
        shifted[:, 2:] = torch.maximum(shifted[:, 2:], shifted[:, :2] + 2)
        shifted = shifted.clamp(min=0).minimum(torch.tensor([SIZE[1], SIZE[0]] * 2))
        labels = [*target["labels"].tolist(), *draw.randint(0, 3, len(boxes)).tolist()]
        other = torch.from_numpy(draw.randint(0, 3, len(boxes)))
        labels = torch.where(
            torch.from_numpy(draw.rand(len(boxes)) < 0.2), other, torch.tensor(labels[: len(boxes)])
        )
        made.append(
            {
                "image_id": target["image_id"],
                "boxes": shifted,
                "labels": labels.long(),
                "scores": torch.from_numpy(draw.rand(len(boxes))).float(),
                "masks": filled(shifted),
            }
        )
    return made


def reference(kind: str, targets: list[Any], predictions: list[Any]) -> np.ndarray:
    """The twelve numbers as pycocotools gives them, from files with ids from 1."""
    annotations = []
    for target in targets:
        runs = encode(target["masks"].numpy())
        for i, (left, top, right, bottom) in enumerate(target["boxes"].tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": target["image_id"],
                    "category_id": int(target["labels"][i]) * 10 + 5,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(target["area"][i]),
                    "iscrowd": int(target["iscrowd"][i]),
                    "segmentation": {"size": [*SIZE], "counts": runs[i]},
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": t["image_id"], "height": SIZE[0], "width": SIZE[1]} for t in targets],
            "annotations": annotations,
            "categories": [{"id": 5}, {"id": 15}, {"id": 25}],
        }
        known.createIndex()
        results = coco_predictions(predictions, (5, 15, 25))
        if kind == "box":
            for one in results:
                del one["segmentation"]
        evaluation = COCOeval(known, known.loadRes(results), {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats: np.ndarray = evaluation.stats
    return stats


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_numbers_are_those_of_pycocotools(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = truth(40)
    predictions = poor(targets)
    for one in predictions:  # as a file rounds them
        one["scores"] = (one["scores"] * 1e4).round() / 1e4
    metric = AveragePrecision(kind, 3)
    for one, target in zip(predictions, targets, strict=True):
        metric.update([one], [target])
    value, scores = metric.compute(), metric.scores
    assert scores is not None and capsys.readouterr().out == ""
    expected = reference(kind, targets, predictions)
    assert 0.1 < expected[0] < 0.9
    found = [scores.ap, scores.ap50, scores.ap75, scores.small, scores.medium, scores.large]
    assert found == pytest.approx(expected[:6].tolist(), abs=1e-9)
    assert scores.recall == pytest.approx(expected[8], abs=1e-9)
    assert float(value) == scores.ap and len(scores.per_class) == 3
    assert np.mean(scores.per_class) == pytest.approx(scores.ap)
    assert scores.images == 40 and f"AP {100 * scores.ap:.1f}" in scores.sentence()


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_perfect_predictions_score_one(kind: str) -> None:
    """With image ids from 0, crowds, and images without objects."""
    targets = truth(12)
    assert any(target["iscrowd"].any() for target in targets)
    metric = AveragePrecision(kind, 3)
    metric.update(perfect(targets), targets)
    assert float(metric.compute()) == ONE
    assert metric.scores is not None and metric.scores.per_class == (ONE, ONE, ONE)
    metric.reset()
    metric.update(perfect(targets)[:1], targets[:1])
    assert float(metric.compute()) == ONE and metric.scores.images == 1


def test_perfect_predictions_of_a_file_with_ids_from_zero(tmp_path: Path) -> None:
    """pycocotools by itself takes an object with the id 0 for one that was not found."""
    targets = [target for target in truth(4) if len(target["labels"])]
    annotations = [
        {
            "id": number,
            "image_id": target["image_id"],
            "category_id": int(label) + 1,
            "bbox": [float(box[0]), float(box[1]), *(box[2:] - box[:2]).tolist()],
            "area": float(area),
            "iscrowd": 0,
        }
        for target in targets
        for number, (box, label, area) in enumerate(
            zip(target["boxes"], target["labels"], target["area"], strict=True)
        )
    ]
    images = [
        {"id": one["image_id"], "file_name": f"{one['image_id']}.png", "height": 120, "width": 160}
        for one in targets
    ]
    (tmp_path / "train").mkdir()
    for one in images:
        (tmp_path / "train" / one["file_name"]).touch()
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
    }
    (tmp_path / "instances_train.json").write_text(json.dumps(content))
    source = open_source(f"coco:{tmp_path}")
    known = [source.targets(i) for i in range(len(source))]
    metric = AveragePrecision("box", 3)
    metric.update(perfect_boxes(known), known)
    assert float(metric.compute()) == ONE


def perfect_boxes(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))}
        for t in targets
    ]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_objects() -> None:
    metric = AveragePrecision("box", 3)
    assert math.isnan(metric.compute()) and metric.scores is not None
    targets = [target for target in truth(8) if not len(target["labels"])]
    metric.update(poor(targets), targets)
    assert math.isnan(metric.compute())
    assert metric.scores.sentence() == ("no objects in 2 images, so there is no average precision")
    # Objects of one size alone: the others have none, and are not -1.
    metric.reset()
    (one,) = truth(1)
    boxes = torch.tensor([[0.0, 0, 100, 100]])
    one |= {"boxes": boxes, "labels": torch.tensor([1]), "iscrowd": torch.zeros(1)}
    del one["area"], one["masks"]
    metric.update(perfect_boxes([one]), [one])
    assert float(metric.compute()) == ONE and math.isnan(metric.scores.small)
    assert "small no objects, medium no objects, large 100.0" in metric.scores.sentence()
    assert [math.isnan(value) for value in metric.scores.per_class] == [True, False, True]


def test_nothing_found() -> None:
    targets = truth(4)
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, *SIZE),
    }
    for kind in ("box", "mask"):
        metric = AveragePrecision(kind, 3)
        metric.update([nothing] * 4, targets)
        assert float(metric.compute()) == 0.0


def test_masks_as_a_detector_gives_them() -> None:
    """Probabilities ``[n, 1, H, W]``."""
    targets = truth(4)
    predictions = perfect(targets)
    for one in predictions:
        one["masks"] = one["masks"][:, None] * 0.3 + 0.25
    metric = AveragePrecision("mask", 3)
    metric.update(predictions, targets)
    assert float(metric.compute()) == ONE


def test_the_state_is_small() -> None:
    """A hundred masks an image stay run lengths, and of many detections the best stay."""
    (target,) = truth(1)
    boxes = torch.tensor([rectangle(np.random.RandomState(i)) for i in range(400)]).float()
    prediction = {
        "boxes": boxes,
        "labels": torch.arange(400) % 2,
        "scores": torch.linspace(0, 1, 400),
        "masks": filled(boxes),
    }
    metric = AveragePrecision("mask", 3)
    metric.update([prediction], [target])
    (kept,) = metric.found
    assert kept.shape == (200, 8) and kept[:, 2].min() > 0.49
    held = sum(one.numel() * one.element_size() for one in metric.found_runs + metric.found)
    assert held < 30_000 < prediction["masks"].numel()


@pytest.mark.parametrize("shares", [(3, 9), (12, 0)])
def test_processes_come_together(monkeypatch: pytest.MonkeyPatch, shares: tuple[int, int]) -> None:
    """Each has seen other images, and not as many of them."""
    targets = truth(12)
    predictions = poor(targets)
    whole = AveragePrecision("mask", 3)
    whole.update(predictions, targets)
    whole.compute()
    sides = [AveragePrecision("mask", 3, distributed_available_fn=lambda: True) for _ in shares]
    sides[0].update(predictions[: shares[0]], targets[: shares[0]])
    sides[1].update(predictions[shares[0] :], targets[shares[0] :])
    states = [{name: list(getattr(side, name)) for name in side._defaults} for side in sides]

    def gather(every: list[Any], mine: Any, group: Any = None) -> None:
        every[:] = copy.deepcopy(states)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for side, count in zip(sides, shares, strict=True):
        side.compute()
        assert repr(side.scores) == repr(whole.scores)  # with what is NaN
        assert len(side.images) == count  # as before: more may be counted


def test_what_cannot_be_counted() -> None:
    targets, metric = truth(2), AveragePrecision("mask", 3)
    with pytest.raises(ValueError, match="kind"):
        AveragePrecision("boxes", 3)
    with pytest.raises(ValueError, match="1 predictions were given for 2 images"):
        metric.update(perfect(targets)[:1], targets)
    with pytest.raises(ValueError, match="image 0 has the predicted class 7; classes lie in 0..2"):
        metric.update(
            [{**perfect(targets)[0], "labels": targets[0]["labels"] * 0 + 7}], targets[:1]
        )
    with pytest.raises(ValueError, match="a target has no 'masks'"):
        metric.update(
            perfect(targets)[:1], [{k: targets[0][k] for k in ("image_id", "boxes", "labels")}]
        )
    # pycocotools would compare masks of two sizes for ever.
    smaller = [{**one, "masks": one["masks"][..., :60, :80]} for one in perfect(targets)]
    words = r"image 0 has predicted masks of \[60, 80\] and target masks of \[120, 160\]"
    with pytest.raises(ValueError, match=words):
        metric.update(smaller[:1], targets[:1])
    metric.update(perfect(targets), targets)
    metric.update(perfect(targets)[:1], targets[:1])
    with pytest.raises(ValueError, match="image 0 was counted twice"):
        metric.compute()


def test_predictions_as_a_file(tmp_path: Path) -> None:
    """With the data set's own ids of categories, as COCO's tools load them."""
    targets = truth(6)
    source = open_source("scenes:size=32,train=6")
    path = tmp_path / "found.json"
    write_predictions(path, perfect(targets), source)
    stored = json.loads(path.read_text())
    labels = torch.cat([one["labels"] for one in perfect(targets)])
    assert [one["category_id"] for one in stored] == (labels + 1).tolist()
    first = next(one for one in perfect(targets) if len(one["labels"]))
    left, top, right, bottom = first["boxes"][0].tolist()
    assert stored[0]["bbox"] == [left, top, right - left, bottom - top]
    assert stored[0]["image_id"] == first["image_id"] and stored[0]["score"] == 1.0
    assert stored[0]["segmentation"]["size"] == [*SIZE]
    assert reference("mask", targets, perfect(targets))[0] == ONE
    with pytest.raises(ValueError, match="has the predicted class 2; the data have 2 classes"):
        coco_predictions(
            [{"image_id": 4, "boxes": [[0, 0, 1, 1]], "labels": [2], "scores": [1.0]}], (5, 6)
        )


def test_scenes_from_end_to_end() -> None:
    source = open_source("scenes:size=64,train=12")
    targets = [source.targets(i) for i in range(len(source))]
    metrics = [AveragePrecision(kind, 10) for kind in ("box", "mask")]
    for metric in metrics:
        metric.update(perfect(targets), targets)
        assert float(metric.compute()) == ONE
    assert not isinstance(source, CocoSource)


# Semantic segmentation ----------------------------------------------------------------------------


def test_mean_iou_is_of_the_data_set() -> None:
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randint(0, 4, size, generator=draw) for size in ((8, 9), (30, 20), (5, 5))]
    maps[0][:3], maps[2][:] = IGNORE, 1
    answers = [torch.randint(0, 4, one.shape, generator=draw) for one in maps]
    metric = MeanIoU(6)
    for answer, one in zip(answers, maps, strict=True):
        metric.update(answer[None], one[None])
    known = torch.cat([one.flatten() for one in maps])
    guess = torch.cat([one.flatten() for one in answers])[known != IGNORE]
    known = known[known != IGNORE]
    each = [
        float(((known == c) & (guess == c)).sum() / ((known == c) | (guess == c)).sum())
        for c in range(4)
    ]
    assert float(metric.compute()) == pytest.approx(np.mean(each))
    assert metric.per_class[:4] == pytest.approx(each)
    assert math.isnan(metric.per_class[4]) and math.isnan(metric.per_class[5])
    assert isinstance(metric, MulticlassJaccardIndex)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_mean_iou_of_logits_and_of_nothing() -> None:
    metric = MeanIoU(3)
    assert math.isnan(metric.compute())
    metric.reset()
    maps = torch.tensor([[[0, 1, 2, IGNORE]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 2, 0]]]), 3).movedim(-1, 1).float()
    metric.update(logits, maps)
    assert float(metric.compute()) == ONE


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes alone need the library too, which is an extra."""
    targets = truth(1)
    metric = AveragePrecision("box", 3)
    metric.update([{**one, "scores": torch.ones(len(one["labels"]))} for one in targets], targets)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=r"need pycocotools: pip install 'foveate\[dense\]'"):
        metric.compute()
