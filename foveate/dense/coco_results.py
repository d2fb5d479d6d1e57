"""Write what a detector found as COCO's tools and servers take it."""

# Apart from the metrics: predicting shall not wait for torchmetrics, which loads for seconds.

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.data import Source
from foveate.data.rle import encode
from foveate.files import write_text

__all__ = ["coco_predictions", "numbers", "runs", "write_predictions"]


def numbers(values: Any) -> np.ndarray:
    """Return values as an array of float64."""
    tensor = values.as_subclass(Tensor) if isinstance(values, Tensor) else torch.as_tensor(values)
    found: np.ndarray = tensor.detach().cpu().double().numpy()
    return found


def runs(masks: Any) -> list[bytes]:
    """Return run lengths of masks ``[n, H, W]`` or ``[n, 1, H, W]``; floats count from 0.5 on."""
    masks = masks.as_subclass(Tensor).detach().cpu()
    if masks.ndim == 4:
        masks = masks[:, 0]
    masks = masks >= 0.5 if masks.is_floating_point() else masks > 0
    return encode(masks.numpy())


def coco_predictions(
    predictions: Sequence[Mapping[str, Any]], category_ids: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Convert predictions to the form that COCO's tools and servers take.

    Args:
        predictions: for each image "image_id", "boxes", "scores", "labels" and perhaps "masks", as
            ``AveragePrecision`` takes them.
        category_ids: ``source.category_ids`` of the data set; None if labels are the ids.
    """
    made = []
    for prediction in predictions:
        boxes, scores = numbers(prediction["boxes"]), numbers(prediction["scores"])
        labels = numbers(prediction["labels"]).astype(int).tolist()
        masks = prediction.get("masks")
        counts = [] if masks is None else runs(masks)
        for i, (label, score) in enumerate(zip(labels, scores.tolist(), strict=True)):
            if category_ids is not None and not 0 <= label < len(category_ids):
                raise ValueError(
                    f"image {prediction['image_id']} has the predicted class {label}; the data "
                    f"have {len(category_ids)} classes, counted from 0"
                )
            left, top, right, bottom = (round(float(side), 2) for side in boxes[i])
            one: dict[str, Any] = {
                "image_id": int(prediction["image_id"]),
                "category_id": label if category_ids is None else int(category_ids[label]),
                "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                "score": round(score, 5),
            }
            if masks is not None:
                size = [int(side) for side in masks.shape[-2:]]
                one["segmentation"] = {"size": size, "counts": counts[i].decode("ascii")}
            made.append(one)
    return made


def write_predictions(path: Path, predictions: Sequence[Mapping[str, Any]], source: Source) -> None:
    """Write predictions as a COCO result file, with the ids of the data set."""
    write_text(path, json.dumps(coco_predictions(predictions, source.category_ids)))
