"""Evaluate detectors and segmenters: AP or mIoU, multiply-adds, tokens, speed.

Answers are compared in the pixels of the files. Multiply-adds are counted by torch on images of the
data, since methods such as SViT decide for each; reading single points of a map (deformable
attention, RoIAlign) and resizing do not count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foveate import api, machine
from foveate.core.calibration import can_calibrate
from foveate.core.cost import counting
from foveate.core.evaluation import answering
from foveate.data import (
    Loader,
    Source,
    dense_eval_transform,
    dense_train_transform,
    limited,
    listed,
    open_images,
)
from foveate.data.augment import Transform
from foveate.data.dense_augment import DenseAugment
from foveate.data.sources.base import OBJECTS, PIXELS
from foveate.data.splits import Part
from foveate.dense import DenseModel, Segmenter, calibrate
from foveate.dense.labels import has_masks
from foveate.measure.run import Evaluation, Plan, Progress, record
from foveate.measure.table import frame, pd, rows
from foveate.timing import measure

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["CALIBRATED", "evaluate_dense"]

_COUNTED = 16  # images whose multiply-adds and tokens are counted
_TIMED = 4  # number of batches in each timing, because the cost may depend on the image
CALIBRATED = " calibrated"  # added to a method's name
_DENSE = ""  # the method of a model without one, as in every table
_OF_SCORES = ("ap", "ap50", "ap75", "small", "medium", "large", "recall")


def evaluate_dense(
    models: Mapping[str, DenseModel],
    plan: Plan,
    *,
    command: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate dense models with all tokens, with their method, and with others.

    The metrics of the part "dense" are box_ap, box_ap50, ... and mask_ap, ..., or miou, in 0..1;
    images; macs of the whole network and backbone_macs (ViT and adapter or pyramid); and usage, the
    share of the patches that the blocks work on. The part "usage" has the last by block, "per
    class" the AP or IoU of each class by its number, and "dense speed" the images a second of
    network and backbone, with their ratio to the dense model's.

    Args:
        models: detectors or segmenters by the names that tables give them; they are moved to the
            plan's device.
        plan: what to do; occlusion, pruning, statistics and rates are for classifiers.
        command: what was typed, for the record.
        progress: told how far everything is.
    """
    told = progress or (lambda title, done, total: None)
    for name in ("occlusion", "pruning", "statistics", "rates"):
        if getattr(plan, name):
            raise ValueError(f"--{name} is for classifiers: detectors and segmenters have no such")
    device = machine.device_of(plan.device)
    parts: list[pd.DataFrame] = []
    about: dict[str, Any] = {}
    for label, model in models.items():
        job = _Job(label, model.to(device), plan, told)
        with answering(*job.variants.values(), precision=plan.precision):
            found = [*job.scores(), *job.costs(), *(job.speed(b) for b in plan.speed)]
        parts += [frame(part, run=label) for part in found]
        about[label] = {
            "method": None if model.reducer.name == "dense" else repr(model.reducer),
            "parameters": sum(p.numel() for p in model.parameters()),
            "classes": list(model.class_names),
            "unreadable": len(job.loader.unreadable),
            "counted images": len(job.some(_COUNTED)),
        }
    here, commit = machine.facts(torch.device(device).type), machine.commit()
    table = pd.concat(parts, ignore_index=True)
    table = frame(table, commit=commit or "unknown", machine=machine.name(here))
    return Evaluation(
        table,
        {
            **{"command": command, "commit": commit, "machine": here, "settings": record(plan)},
            "models": about,
        },
    )


@dataclass
class _Seen:
    """The counts of one variant."""

    metrics: dict[str, Metric]
    macs: dict[str, list[float]] = field(default_factory=dict)
    usage: list[Tensor] = field(default_factory=list)  # [blocks] of each image


class _Job:
    """One model with its variants and its images."""

    def __init__(self, label: str, model: DenseModel, plan: Plan, told: Progress) -> None:
        self.label, self.model, self.plan, self.told = label, model, plan, told
        self.pixels = isinstance(model, Segmenter)
        self.labels_of = PIXELS if self.pixels else OBJECTS
        self.masks = hasattr(getattr(model, "roi_heads", None), "mask_head") and (
            model.roi_heads.mask_head is not None  # type: ignore[union-attr]
        )
        self.source = limited(self._open(plan.split), plan.limit, balanced=False)
        classes = self.source.classes or ()
        if self.pixels:
            classes = self.source.pixel_classes or classes
        if len(classes) != model.num_classes or (
            model.class_names and tuple(classes) != model.class_names
        ):
            raise ValueError(
                f"{label} knows {model.num_classes} classes ({', '.join(model.class_names[:3])}, "
                f"...) and {self.source.spec} has {len(classes)} ({', '.join(classes[:3])}, ...): "
                "they do not belong together"
            )
        if self.masks and not has_masks(self.source):
            raise ValueError(
                f"{label} answers with masks, and {self.source.spec} has boxes without masks: give "
                "data with masks, or a detector with head.name=faster_rcnn, which has boxes alone"
            )
        self.channels = model.reduced.backbone.channels
        self.loader = self._load(self.source, dense_eval_transform(self.channels, short=None))
        self.variants: dict[str, DenseModel] = {_DENSE: api.unwrap(model)}  # type: ignore[dict-item]
        if model.reducer.name != "dense":
            self.variants[repr(model.reducer)] = model
        methods = plan.methods
        for method in methods.get(label, ()) if isinstance(methods, Mapping) else methods:
            with torch.random.fork_rng():
                torch.manual_seed(plan.seed)
                made = api.apply(self.variants[_DENSE], method)
            self.variants[repr(made.reducer)] = made
        if plan.calibration:
            self._calibrate(plan.calibration)
        self.seen = {name: _Seen(self._metrics()) for name in self.variants}

    def _open(self, split: str | None) -> Source:
        plan = self.plan
        found = open_images(
            plan.data,
            split,
            share=plan.val_share,
            seed=plan.split_seed,
            labels_of=self.labels_of,
        )
        return found if self.masks or self.pixels else found.boxes_only()

    def _load(self, source: Source, transform: Transform) -> Loader:
        plan = self.plan
        return Loader(
            source,
            transform,
            train=False,
            batch=plan.batch,
            collate=listed,
            workers=plan.workers,
            corrupt="fail" if plan.strict else "skip",
        )

    def _calibrate(self, count: int) -> None:
        gated = {
            name: model for name, model in self.variants.items() if can_calibrate(model.reducer)
        }
        if not gated:
            raise ValueError(
                f"{self.label} has no method with gates to calibrate (a fixed count needs none)"
            )
        source = limited(self._open("train"), count, balanced=False)
        plain = dense_train_transform(DenseAugment(resize="none", flip=0.0), self.channels)
        batches = [self._images(batch) for batch in self._load(source, plain)]
        for name, model in gated.items():
            shifted = copy.deepcopy(model)
            calibrate(shifted, batches)
            self.variants[name + CALIBRATED] = shifted

    def _metrics(self) -> dict[str, Metric]:
        # Here, since torchmetrics loads for seconds, and classifiers need none of it.
        from foveate.dense.metrics import AveragePrecision, MeanIoU

        if self.pixels:
            return {"miou": MeanIoU(self.model.num_classes)}
        kinds = ("box", "mask") if self.masks else ("box",)
        return {f"{kind}_": AveragePrecision(kind, self.model.num_classes) for kind in kinds}

    def _images(self, batch: Mapping[str, Any]) -> list[Tensor]:
        like = next(self.model.parameters())
        return [image.to(like.device).to(like.dtype) / 255 for image in batch["image"]]

    # Measuring ------------------------------------------------------------------------------------

    def scores(self) -> Iterator[pd.DataFrame]:
        """Compare the answers of all variants in one pass over the images."""
        from foveate.dense.metrics import AveragePrecision, MeanIoU

        title, total = f"{self.label}: accuracy", len(self.loader)
        self.told(title, 0, total)
        for number, batch in enumerate(self.loader, 1):
            images, targets = self._images(batch), batch["targets"]
            for name, model in self.variants.items():
                answers = model(images)
                for metric in self.seen[name].metrics.values():
                    if self.pixels:
                        for answer, target in zip(answers, targets, strict=True):
                            metric.update(answer.cpu().flatten(), target["semantic"].flatten())
                    else:
                        metric.update(answers, targets)
            self.told(title, number, total)
        for name, seen in self.seen.items():
            values: dict[str, Any] = {"images": len(self.source) - len(self.loader.unreadable)}
            each: dict[str, Sequence[float]] = {}
            for key, metric in seen.metrics.items():
                value = float(metric.compute())
                if isinstance(metric, AveragePrecision):
                    assert metric.scores is not None
                    values |= {f"{key}{one}": getattr(metric.scores, one) for one in _OF_SCORES}
                    each[f"{key}ap"] = metric.scores.per_class
                elif isinstance(metric, MeanIoU):
                    values[key], each["iou"] = value, metric.per_class
            yield frame(rows("dense", values, method=name))
            for what, numbers in each.items():
                for label, score in enumerate(numbers):
                    yield frame(rows("per class", {what: score}, method=name, at=label))

    def costs(self) -> Iterator[pd.DataFrame]:
        """Count multiply-adds and the use of patches, image by image."""
        first = self.some(_COUNTED)
        title = f"{self.label}: multiply-adds"
        for number, images in enumerate(self._one_by_one(first), 1):
            for name, model in self.variants.items():
                macs, usage = _counted(model, images)
                seen = self.seen[name]
                for what, value in macs.items():
                    seen.macs.setdefault(what, []).append(value)
                seen.usage.append(usage)
            self.told(title, number, len(first))
        for name, seen in self.seen.items():
            usage = torch.stack(seen.usage).mean(0)
            values = {what: sum(found) / len(found) for what, found in seen.macs.items()}
            yield frame(rows("dense", {**values, "usage": float(usage.mean())}, method=name))
            for block, share in enumerate(usage.tolist()):
                yield frame(rows("usage", {"usage": share}, method=name, at=block))

    def _one_by_one(self, source: Source) -> Iterator[list[Tensor]]:
        prepare = dense_eval_transform(self.channels, short=None)
        for index in range(len(source)):
            yield self._images(listed([prepare(source.sample(index))]))

    def speed(self, batch: int) -> pd.DataFrame:
        """Time network and backbone of all variants, interleaved, on images of the data."""
        images = [one for (one,) in self._one_by_one(self.some(batch * _TIMED))]
        batches = [images[n : n + batch] for n in range(0, len(images), batch)]
        count = len(images)
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, model in {**self.variants, _AGAIN: self.variants[_DENSE]}.items():
            calls[name, "network"] = _over(model, batches)
            calls[name, "backbone"] = _over_backbone(model, batches)
        timings = measure(
            {"\n".join(key): call for key, call in calls.items()},
            rounds=self.plan.rounds,
            warmup=2,
            sample_ms=20.0,
            device=next(self.model.parameters()).device.type,
            seed=self.plan.seed,
            progress=lambda done, total: self.told(f"{self.label}: speed", done, total),
        )
        found = []
        for name in self.variants:
            values: dict[str, float] = {"rounds": self.plan.rounds}
            for part, prefix in (("network", ""), ("backbone", "backbone_")):
                against = _AGAIN if name == _DENSE else _DENSE
                ratio = timings.ratio(f"{name}\n{part}", f"{against}\n{part}")
                values[f"{prefix}times"] = ratio.median
                values[f"{prefix}low"], values[f"{prefix}high"] = ratio.low, ratio.high
                took = timings.ms(f"{name}\n{part}").median
                values[f"{prefix}per_second"] = 1000 * count / took
            found += rows("dense speed", values, method=name, at=batch)
        return frame(found)

    def some(self, count: int) -> Source:
        """Return some of the images that ``scores`` could read."""
        source, skipped = self.source, self.loader.unreadable
        if skipped:
            readable = [n for n in range(len(source)) if source.name(n) not in skipped]
            source = Part(source, np.array(readable), source.split)
        return limited(source, count, balanced=False)


_AGAIN = "dense again"


def _over(model: DenseModel, batches: Sequence[list[Tensor]]) -> Callable[[], Any]:
    return lambda: [model(images) for images in batches]


def _over_backbone(model: DenseModel, batches: Sequence[list[Tensor]]) -> Callable[[], Any]:
    prepared = [model.prepared(images) for images in batches]
    return lambda: [model.trunk(images) for images in prepared]


def _counted(model: DenseModel, images: list[Tensor]) -> tuple[dict[str, float], Tensor]:
    """Return multiply-adds of an image, and the share of its patches that each block works on."""
    prepared = model.prepared(images)
    usage = model.trunk.trace(prepared).used().float().mean((1, 2))
    with counting(model) as spent:
        model(images)
        whole = spent()
        model.trunk(prepared)
        backbone = spent() - whole
    return {"macs": whole, "backbone_macs": backbone}, usage.cpu()
