"""Measure how often models are right and what they cost: top-1, top-5, multiply-adds, tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate import facts
from foveate.core import ReducedViT
from foveate.core.evaluation import answering, logits_of
from foveate.measure.table import frame, pd, rows, select

__all__ = [
    "Accuracy",
    "Batch",
    "Batches",
    "Tally",
    "accuracy",
    "costs",
    "drops",
]

_TOP = 5

# Normalised images [B, C, H, W], classes [B], and the number of each image in its data set [B].
Batch = tuple[Tensor, Tensor, Tensor]
# Gives a fresh pass over the data at every call; all on the model's device.
Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Accuracy:
    """The share of right answers, in per cent.

    Attributes:
        top1: share of images whose most likely class is right.
        top5: share of images whose class is among the five most likely; None for models with at
            most five classes.
        images: number of images.
    """

    top1: float
    top5: float | None
    images: int


class Tally:
    """Counts right answers.

    Attributes:
        classes: how many the data set has; None takes the model's word where the labels allow it.
    """

    def __init__(self, classes: int | None = None) -> None:
        self.classes = classes
        self._images = self._outputs = 0
        self._right = (0, 0)  # among the best and among the five best

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count answers ``logits [B, classes]`` to images of the classes ``labels [B]``."""
        if logits.ndim != 2:
            raise ValueError(
                f"class logits [B, classes] are needed; the model answers {list(logits.shape)}"
            )
        self._check(logits, labels)
        self._outputs = logits.shape[1]
        hits = logits.topk(min(_TOP, self._outputs)).indices == labels[:, None]
        one, five = self._right
        self._right = one + int(hits[:, 0].sum()), five + int(hits.sum())
        self._images += len(labels)

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
            raise ValueError("the model's answers contain NaN or infinity: its weights are broken")

    def result(self) -> Accuracy:
        """Return what was counted so far; ValueError before anything was."""
        if not self._images:
            raise ValueError("the data set gave no image, so there is no accuracy")
        one, five = (100 * right / self._images for right in self._right)
        return Accuracy(one, five if self._outputs > _TOP else None, self._images)


def accuracy(
    model: nn.Module, batches: Batches, *, classes: int | None = None, precision: str = "fp32"
) -> Accuracy:
    """Count how often a model is right.

    Args:
        model: any model that returns logits, or an output with logits.
        batches: gives a pass over the data.
        classes: number of classes of the data set; a model with another number is refused.
        precision: "fp32", or "bf16" for automatic mixed precision.
    """
    tally = Tally(classes)
    with answering(model, precision=precision):
        for images, labels, _ in batches():
            tally.add(logits_of(model(images)), labels)
    return tally.result()


def costs(
    models: Mapping[str, nn.Module],
    batches: Batches,
    *,
    classes: int | None = None,
    precision: str = "fp32",
) -> pd.DataFrame:
    """Measure accuracy, multiply-adds and tokens of several models in one pass over the data.

    The metrics are top1, top5, images, macs, dense_macs, tokens (that the last block feeds
    forward, mean over images, prefix included) and measured (1 where counts differ between images,
    so that they are means). A model that foveate cannot count has the first three.

    Args:
        models: models on one device that take the same input, by name.
        batches: gives a pass over the data.
        classes: how many the data set has.
        precision: as ``accuracy`` takes it.
    """
    if not models:
        raise ValueError("no model was given: at least one is needed")
    tallies = {name: Tally(classes) for name in models}
    meters = {name: _Meter(model) for name, model in models.items()}
    with answering(*models.values(), precision=precision):
        for images, labels, _ in batches():
            for name, meter in meters.items():
                tallies[name].add(meter.answer(images), labels)
    found = []
    for name, model in models.items():
        counted = vars(tallies[name].result()) | meters[name].result()
        found += rows("accuracy", counted, method=name_of(model), rate=rate_of(model))
    return frame(found)


def drops(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of the metric drop: points of top-1 below the dense model of the same seed.

    A dense model that all seeds share is compared with each.
    """
    top1 = select(table, part="accuracy", metric="top1")
    dense, reduced = top1[top1["method"] == ""], top1[top1["method"] != ""]
    keys = ["run", "seed"]
    paired = reduced.merge(dense[[*keys, "value"]], on=keys, how="left", suffixes=("", "_dense"))
    shared = dense[dense["seed"].isna()].set_index("run")["value"]
    base = paired["value_dense"].fillna(paired["run"].map(shared))
    return frame(paired.assign(metric="drop", value=base - paired["value"])[base.notna()])


def name_of(model: nn.Module) -> str:
    """Return the method with its options, as ``foveate.apply`` takes it; "" for no method."""
    return repr(model.reducer) if isinstance(model, ReducedViT) else ""


def rate_of(model: nn.Module) -> float | None:
    """Return the rate of a model's method: keep, r or K; None where it is no single number."""
    if not isinstance(model, ReducedViT):
        return None
    rate = getattr(model.reducer, model.reducer.rate or "", None)
    return float(rate) if isinstance(rate, (int, float)) else None


class _Meter:
    """Collect the answers and costs of one model, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.varies = isinstance(model, ReducedViT) and not model.reducer.fixed_count
        self.counts: list[tuple[int, facts.Count]] = []  # images, and what each of them costs

    def answer(self, images: Tensor) -> Tensor:
        """Return logits; where counts depend on the image, those of these images are counted."""
        if isinstance(self.model, ReducedViT) and self.varies:
            trace = self.model.trace(images)
            try:
                counted = facts.count(self.model, trace=trace)
            except ValueError:  # a method without its own count of costs is counted by running
                counted = facts.count(self.model, images=images)
            self.counts.append((len(images), counted))
            return trace.logits
        if not self.counts:
            # A model that is not a plain ViT still has an accuracy.
            with suppress(ValueError):
                self.counts.append((1, facts.count(self.model, (images.shape[2], images.shape[3]))))
        return logits_of(self.model(images))

    def result(self) -> dict[str, Any]:
        """Return what an image costs."""
        if not self.counts:
            return {}
        images = sum(n for n, _ in self.counts)
        return {
            "macs": sum(n * counted.macs for n, counted in self.counts) / images,
            "dense_macs": self.counts[-1][1].dense_macs,
            "tokens": sum(n * counted.tokens[-1] for n, counted in self.counts) / images,
            "measured": 1 if self.counts[-1][1].how == "measured" else None,
        }
