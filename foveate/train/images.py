"""Tasks on whole images: preparation for the model, and mixing for classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from foveate.backbones import backbone_of
from foveate.core import ReducedViT, Trace
from foveate.core.evaluation import logits_of
from foveate.data import Transform, train_transform
from foveate.train.models import image_inputs
from foveate.train.recipe import Data, Mix
from foveate.train.task import Task

__all__ = ["ClassificationTask", "ImageTask"]


class ImageTask(Task):
    """Images are augmented as the recipe says, and normalised on the device.

    Args:
        model: with a ViT in it.
        vit: that ViT; None is the model itself.
        data: what the recipe says of images.
        weights: see ``Task``.
        teacher: see ``Task``.

    Attributes:
        inputs: what the model takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        data: Data | None = None,
        *,
        vit: nn.Module | None = None,
        weights: Mapping[str, float] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__(model, weights, teacher)
        self._data = data or Data()
        self.inputs = image_inputs(model if vit is None else vit, self._data)
        self._backbone = backbone_of(model if vit is None else vit)
        for name in ("mean", "std"):
            scaled = torch.tensor(getattr(self.inputs, name)).view(1, -1, 1, 1) * 255
            self.register_buffer(name, scaled, persistent=False)

    def transforms(self) -> tuple[Transform, Transform]:
        """Return the recipe's augmentation, and for evaluation the middle of each image."""
        size, channels = self.inputs.size, self.inputs.channels
        return train_transform(self._data.augment, size, channels), self.inputs.transform()

    def units(self) -> list[nn.Module]:
        """Return the blocks of the ViT."""
        return list(self._backbone.blocks)

    def trace(self, model: nn.Module, batch: Mapping[str, Any]) -> Trace | None:
        """Record the tokens of a batch in every block."""
        return model.trace(self.pixels(batch)) if isinstance(model, ReducedViT) else None

    def pixels(self, batch: Mapping[str, Any]) -> Tensor:
        """Normalise images ``[B, C, H, W]``; floating-point ones are taken as normalised."""
        images: Tensor = batch["image"]
        if images.is_floating_point():
            return images
        return images.to(self.mean.dtype).sub_(self.mean).div_(self.std)


class ClassificationTask(ImageTask):
    """Images with one label each: mixing, soft labels, and accuracy in per cent.

    Args:
        model: a plain classifier or a reduced one.
        classes: how many there are.
        data: what the recipe says of images.
        mix: what is done to a batch on the device.
        weights: see ``Task``.
        teacher: see ``Task``.
    """

    score: str = "accuracy"
    higher_is_better: bool = True

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        data: Data | None = None,
        mix: Mix | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__(model, data, weights=weights, teacher=teacher)
        self.classes, mix = classes, mix or Mix()
        self.smoothing = mix.smoothing
        self._mixup = self._erase = None
        if mix.mixup or mix.cutmix:
            if self._data.batch % 2:
                raise ValueError(
                    f"mixing pairs images: data.batch must be even, got {self._data.batch}"
                )
            self._mixup = Mixup(
                mix.mixup,
                mix.cutmix,
                prob=mix.prob,
                switch_prob=mix.switch,
                label_smoothing=mix.smoothing,
                num_classes=classes,
            )
        if mix.erase:
            self._erase = RandomErasing(mix.erase, mode="pixel", device="cpu")

    def mixed(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images and targets of a step: labels ``[B]``, or soft ones ``[B, classes]``.

        timm's mixing and erasing draw from the global generators, which every step seeds.
        """
        x, labels = self.pixels(batch), batch["label"]
        if self._erase is not None:
            self._erase.device = x.device
            x = self._erase(x)
        if self._mixup is not None:
            mixed: tuple[Tensor, Tensor] = self._mixup(x, labels)
            return mixed
        if self.smoothing:
            soft = F.one_hot(labels, self.classes).to(x.dtype)
            return x, soft * (1 - self.smoothing) + self.smoothing / self.classes
        return x, labels

    def classified(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the classification loss, and note the accuracy in training."""
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        right = (logits.detach().argmax(1) == labels).float().mean()
        self.notes["accuracy"] = 100 * right
        return F.cross_entropy(logits.float(), targets)

    def metrics(self) -> dict[str, Metric]:
        """Return metrics for the loss, and for accuracies in per cent."""
        # By default the mean would be that of the other images.
        seen = partial(MeanMetric, nan_strategy=float("nan"))
        kinds: dict[str, Callable[[], Metric]] = {"loss": seen}
        for name, k in (("accuracy", 1), ("top5", 5)):
            if k == 1 or self.classes > k:
                kinds[name] = partial(_PerCent, self.classes, top_k=k, average="micro")
        return {name: kind() for name, kind in kinds.items()}

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        """Count right answers."""
        labels = batch["label"]
        logits = logits_of(model(self.pixels(batch))).float()
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(F.cross_entropy(logits, labels), weight=len(labels))
            else:
                metric.update(logits, labels)


class _PerCent(MulticlassAccuracy):
    def compute(self) -> Tensor:
        """Return the accuracy times a hundred."""
        return 100 * super().compute()
