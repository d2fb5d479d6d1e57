"""Training a detector, dense or with a method; with masks or with boxes alone.

SViT's paper trains dense first, then fine-tunes the dense detector with gates for a few epochs:
``model.start`` names the run of the first for the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from foveate.data import Splits
from foveate.data.sources.base import OBJECTS
from foveate.dense.labels import has_masks
from foveate.dense.metrics import AveragePrecision
from foveate.train.dense import DenseTask, make_dense_model, train_dense
from foveate.train.dense_recipe import Detect
from foveate.train.draws import Draws
from foveate.train.result import Result

__all__ = ["DetectTask", "detect", "make_detect"]

_BOXES = ("objectness", "rpn_box_reg", "classifier", "box_reg")


class DetectTask(DenseTask):
    """torchvision's losses of proposals, boxes and masks; average precision of both."""

    score: str = "box_ap"
    heads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "faster_rcnn": _BOXES,
        "mask_rcnn": (*_BOXES, "mask"),
    }

    @property
    def masks(self) -> bool:
        """Whether the model answers with masks too."""
        return "mask" in self.heads[self.model.settings["head"]["name"]]

    def read(self, splits: Splits) -> Splits:
        """Leave masks out where nothing learns from them: objects without one count too then."""
        if self.masks:
            return splits
        val = None if splits.val is None else splits.val.boxes_only()
        return replace(splits, train=splits.train.boxes_only(), val=val)

    def wanted(self, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Return boxes, labels and, if the model answers with masks, masks."""
        keys = ("boxes", "labels", *(("masks",) if self.masks else ()))
        return [{key: target[key] for key in keys} for target in batch["targets"]]

    def drawn(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """Return a seed for each image, by which samples are taken of anchors and proposals."""
        return {"seeds": draws.seeds(len(batch["image"]))}

    def metrics(self) -> dict[str, Metric]:
        """Return average precision of boxes and masks, 0..1."""
        kinds = ("box", "mask") if self.masks else ("box",)
        return {f"{kind}_ap": AveragePrecision(kind, self.model.num_classes) for kind in kinds}

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        """Compare answers with objects, in the pixels of the files."""
        answers = model(self.images(batch))
        for metric in metrics.values():
            metric.update(answers, batch["targets"])


def detect(recipe: Detect, out: Path, **how: Any) -> Result:
    """Train a detector and export it; the further arguments are those of ``fit``."""
    return train_dense(recipe, out, make_detect, OBJECTS, **how)


def make_detect(recipe: Detect, splits: Splits) -> DetectTask:
    """Make the detector for the classes of the data."""
    model = make_dense_model(recipe, splits.train.classes or (), DetectTask.heads, "mask_rcnn")
    task = DetectTask(model, recipe.data, recipe.weights)
    if task.masks:
        for source in filter(None, (splits.train, splits.val)):
            if not has_masks(source):
                raise ValueError(
                    f"{source.spec} has boxes without masks: head.name=faster_rcnn learns boxes "
                    "alone"
                )
    return task
