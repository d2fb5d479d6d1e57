"""Right answers of any model that answers with logits, counted batch by batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import evaluation
from foveate.core.evaluation import logits_of
from foveate.core.schedule import check_choice

__all__ = [
    "PRECISIONS",
    "Accuracy",
    "Batch",
    "Batches",
    "Seeded",
    "Tally",
    "accuracy",
    "evaluating",
    "logits_of",
]

PRECISIONS = ("fp32", "bf16")
_TOP = 5

# Normalised images [B, C, H, W], classes [B], and the number of each image in its data set [B].
Batch = tuple[Tensor, Tensor, Tensor]
# Gives a fresh pass over the data at every call; all on the model's device.
Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Accuracy:
    """Right answers in per cent.

    Attributes:
        top1: the best answer is right.
        top5: one of the five best is; None for models of no more than five classes.
        images: how many images were answered.
    """

    top1: float
    top5: float | None
    images: int


@dataclass(frozen=True)
class Seeded:
    """What the same measurement gave with several seeds, one value each."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.1f}"
        return f"{self.mean:.1f}{spread}"


class Tally:
    """Counts right answers.

    Attributes:
        classes: how many the data set has; None takes the model's word where the labels allow it.
    """

    def __init__(self, classes: int | None = None) -> None:
        try:
            from torchmetrics.classification import MulticlassStatScores
        except ImportError as error:  # of the extra, and nothing but evaluation needs it
            raise ValueError(
                f"accuracy needs torchmetrics ({error}): pip install 'foveate[train]'"
            ) from error
        self._count = MulticlassStatScores
        self.classes = classes
        self._counts: dict[int, Any] = {}  # by k of top-k
        self._outputs = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count answers ``logits [B, classes]`` to images of the classes ``labels [B]``."""
        if logits.ndim != 2:
            raise ValueError(
                f"class logits [B, classes] are needed; the model answers {list(logits.shape)}"
            )
        self._check(logits, labels)
        if not self._counts:
            self._outputs = logits.shape[1]
            self._counts = {
                k: self._count(self._outputs, top_k=k, average="micro", validate_args=False).to(
                    logits.device
                )
                for k in (1, _TOP)[: 1 + (self._outputs > _TOP)]
            }
        for count in self._counts.values():
            count.update(logits.float(), labels)

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        outputs = logits.shape[1]
        if self.classes is not None and self.classes != outputs:
            raise ValueError(
                f"the data set has {self.classes} classes and the model {outputs} outputs: they "
                "do not belong together"
            )
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= outputs:
            raise ValueError(
                f"labels must lie in 0..{outputs - 1}, the model's outputs; got "
                f"{least if least < 0 else most}"
            )
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's answers are not finite numbers: its weights are broken")

    def result(self) -> Accuracy:
        """What was counted so far; ValueError before anything was."""
        if not self._counts:
            raise ValueError("the data set gave no image, so there is no accuracy")
        # Right answers are the true positives, the first of the counts, and images the last.
        found = {k: count.compute().tolist() for k, count in self._counts.items()}
        percent = {k: 100 * right / images for k, (right, *_, images) in found.items()}
        return Accuracy(percent[1], percent.get(_TOP), found[1][-1])


def accuracy(
    model: nn.Module, batches: Batches, *, classes: int | None = None, precision: str = "fp32"
) -> Accuracy:
    """How often a model is right.

    Args:
        model: any that answers images with logits, or with an output that has them.
        batches: gives a pass over the data.
        classes: how many the data set has, to refuse a model of another number.
        precision: "fp32", or "bf16" for automatic mixed precision.
    """
    tally = Tally(classes)
    with evaluating(model, precision=precision):
        for images, labels, _ in batches():
            tally.add(logits_of(model(images)), labels)
    return tally.result()


@contextmanager
def evaluating(*models: nn.Module, precision: str = "fp32") -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    check_choice("precision", precision, PRECISIONS)
    kind = next(models[0].parameters()).device.type
    # Not inference_mode: what a model caches in it could not be used by a training that goes on.
    half = torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")
    with evaluation.evaluating(*models), torch.no_grad(), half:
        yield
