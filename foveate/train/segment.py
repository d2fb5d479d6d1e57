"""Training a network for semantic segmentation, dense or with a method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from foveate.data import Splits
from foveate.data.sources.base import PIXELS
from foveate.dense.metrics import MeanIoU
from foveate.train.dense import DenseTask, make_dense_model, train_dense
from foveate.train.dense_recipe import Segment
from foveate.train.result import Result

__all__ = ["SegmentTask", "segment"]


class SegmentTask(DenseTask):
    """Cross entropy of every pixel; mean intersection over union."""

    score: str = "miou"
    heads: ClassVar[Mapping[str, tuple[str, ...]]] = {"fpn": ("segment",), "upernet": ("segment",)}

    def wanted(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return the label maps."""
        return [target["semantic"] for target in batch["targets"]]

    def metrics(self) -> dict[str, Metric]:
        """Return the mean IoU over the data set, 0..1."""
        return {"miou": MeanIoU(self.model.num_classes)}

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        """Compare the maps, in the pixels of the files."""
        for answer, labels in zip(model(self.images(batch)), self.wanted(batch), strict=True):
            for metric in metrics.values():
                metric.update(answer.flatten(), labels.flatten())


def segment(recipe: Segment, out: Path, **how: Any) -> Result:
    """Train a segmenter and export it; the further arguments are those of ``fit``."""
    return train_dense(recipe, out, make_segment, PIXELS, **how)


def make_segment(recipe: Segment, splits: Splits) -> SegmentTask:
    """Make the network for the classes of the data's label maps."""
    classes = splits.train.pixel_classes or splits.train.classes or ()
    model = make_dense_model(recipe, classes, SegmentTask.heads, "fpn")
    return SegmentTask(model, recipe.data, recipe.weights)
