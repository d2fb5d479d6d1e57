"""What is counted in evaluation, over all processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from foveate.answers import logits_of

__all__ = ["Accuracy", "Scores"]


class Scores(nn.Module):
    """Collects numbers of one model over evaluation batches."""

    shown = ""  # the score for the progress bar

    def update(self, model: nn.Module, images: Tensor, labels: Tensor, index: int) -> None:
        """Count a batch of normalised images, the so-manieth of this process."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """Scores by name, and an empty count again."""
        raise NotImplementedError


class Accuracy(Scores):
    """Loss, and accuracies in per cent, of a classifier."""

    shown = "accuracy"
    _NAMES = {"loss": ("loss", 1.0), "top1": ("accuracy", 100.0), "top5": ("top5", 100.0)}

    def __init__(self, classes: int) -> None:
        super().__init__()
        kinds: dict[str, Callable[[], Metric]] = {"loss": MeanMetric}
        for k in [1, 5] if classes > 5 else [1]:
            kinds[f"top{k}"] = partial(MulticlassAccuracy, classes, top_k=k, average="micro")
        self.metrics = nn.ModuleDict({name: kind() for name, kind in kinds.items()})

    def update(self, model: nn.Module, images: Tensor, labels: Tensor, index: int) -> None:
        """Count right answers."""
        logits = logits_of(model(images)).float()
        for name, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            if name == "loss":
                metric.update(F.cross_entropy(logits, labels), weight=len(labels))
            else:
                metric.update(logits, labels)

    def compute(self) -> dict[str, float]:
        """Accuracies in per cent."""
        found = {}
        for name, metric in self.metrics.items():
            label, scale = self._NAMES[name]
            assert isinstance(metric, Metric)
            found[label] = scale * float(metric.compute())
            metric.reset()
        return found
