"""Evaluate models on a data set, in as few passes as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate import machine
from foveate.backbones import backbone_of
from foveate.core import ReducedViT
from foveate.core.evaluation import PRECISIONS
from foveate.core.schedule import check_choice
from foveate.data import Inputs, Loader, Source, device_batches, limited, open_images
from foveate.data.sources.datasets import describe
from foveate.measure.accuracy import Batch, costs, drops, name_of, rate_of
from foveate.measure.occlusion import check_ratios, check_seeds, occlusion
from foveate.measure.pruning import check_rates, pruning
from foveate.measure.speed import speeds
from foveate.measure.table import Results, frame, pd, rows
from foveate.measure.tokens import TokenStatistics, gather
from foveate.measure.variants import fresh, variants
from foveate.timing import LEAST_ROUNDS

__all__ = ["Evaluation", "Plan", "Progress", "evaluate", "record"]

# Told what is done, how many steps of it are over, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate, and on what.

    Accuracy and multiply-adds are always measured: of every dense model and every method on it.

    Attributes:
        data: data set, as ``foveate.data.open_source`` takes it; may be your own.
        split: "train", "val", "test" or "all"; None takes "test", or else "val", or else "all".
        val_share: share that training held out, for "val" of data without such a split.
        split_seed: seed that chose the held-out images.
        methods: methods to put on the models; see ``variants``. A mapping has them by model.
        rates: rates for methods that name none, and for models that have a method.
        occlusion: shares of patches to drop from the image; an empty list measures no curve.
        pruning: rates of pruning without training; none does not.
        mask_seeds: how many seeds both have.
        only: models of which occlusion and pruning are measured; None is all.
        statistics: gather those of the tokens, for every method.
        speed: batches at which everything is timed in one interleaved run; none times nothing.
        rounds: of that run; fewer than 30 are a trial.
        calibration: number of training images by which gates of detectors and segmenters are
            shifted, so that they keep their shares by arg-max; these are evaluated beside the
            models as they are. 0 shifts none.
        batch: images a call.
        workers: processes that read images.
        limit: use so many images, evenly spaced.
        device: where models and images go; "auto" is a GPU if there is one.
        precision: "fp32", or "bf16" for automatic mixed precision.
        strict: an image that cannot be read is an error.
        seed: of new parameters, and of the order within rounds.
    """

    data: Any
    split: str | None = None
    val_share: float = 0.1
    split_seed: int = 0
    methods: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()
    rates: tuple[float, ...] = ()
    occlusion: tuple[float, ...] = ()
    pruning: tuple[float, ...] = ()
    mask_seeds: int = 3
    only: tuple[str, ...] | None = None
    statistics: bool = False
    speed: tuple[int, ...] = ()
    rounds: int = LEAST_ROUNDS
    calibration: int = 0
    batch: int = 64
    workers: int = 0
    limit: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_seeds(self.mask_seeds)
        if self.occlusion:
            check_ratios(self.occlusion)
        if self.pruning:
            check_rates(self.pruning)
        if any(batch < 1 for batch in self.speed):
            raise ValueError(f"batches of speed must be at least 1, got {list(self.speed)}")
        if self.calibration < 0:
            raise ValueError(f"calibration must be at least 0 images, got {self.calibration}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        for name in ("rounds", "batch", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value}")


@dataclass
class Evaluation(Results):
    """The results, with token statistics as arrays, by model and method."""

    tokens: dict[tuple[str, str], TokenStatistics] = field(default_factory=dict)


def evaluate(
    models: Mapping[str, nn.Module],
    plan: Plan,
    *,
    command: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate models on one data set, each with its own preprocessing.

    Args:
        models: plain ViTs or models from ``foveate.apply``, by the names that tables give them;
            they are moved to the plan's device.
        plan: what to do.
        command: command that was typed, for the record.
        progress: called with the progress of everything.
    """
    told = progress or (lambda title, done, total: None)
    if plan.calibration:
        raise ValueError("calibration is for detectors and segmenters")
    source = open_images(plan.data, plan.split, share=plan.val_share, seed=plan.split_seed)
    plan = replace(plan, split=source.split, device=machine.device_of(plan.device))
    jobs = [_Job(label, model, source, plan, told) for label, model in models.items()]
    parts: list[pd.DataFrame] = []
    found = Evaluation(frame([]))
    for job in jobs:
        parts += [frame(part, run=job.label) for part in job.parts(found.tokens)]
    for batch in plan.speed:
        timed = speeds(
            {job.label: job.variants for job in jobs},
            {job.label: job.images(batch) for job in jobs},
            rounds=plan.rounds,
            precision=plan.precision,
            seed=plan.seed,
            progress=partial(told, f"speed at batch {batch}"),
        )
        parts.append(timed)
    here = machine.facts(torch.device(plan.device).type)
    commit = machine.commit()
    shared = {"commit": commit or "unknown", "machine": machine.name(here)}
    table = frame(pd.concat(parts, ignore_index=True), **shared)
    found.table = pd.concat([table, drops(table)], ignore_index=True)
    found.about = {
        "command": command,
        "commit": commit,
        "machine": here,
        "settings": record(plan),
        "models": {job.label: job.about() for job in jobs},
    }
    return found


def record(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON, with the seeds instead of their number."""
    found = {one.name: getattr(plan, one.name) for one in fields(plan)}
    if not isinstance(plan.data, (str, Path)):
        found["data"] = describe(plan.data)
    found["mask_seeds"] = list(check_seeds(plan.mask_seeds))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


class _Job:
    """One model and its part of the plan. Errors are raised when it is made."""

    def __init__(
        self, label: str, model: nn.Module, source: Source, plan: Plan, told: Progress
    ) -> None:
        self.label, self.model, self.plan, self.told = label, model.to(plan.device), plan, told
        self.classes = None if source.classes is None else len(source.classes)
        named = plan.methods
        methods = named.get(label, ()) if isinstance(named, Mapping) else named
        self.variants = variants(model, methods, plan.rates, seed=plan.seed)
        for variant in self.variants.values():
            variant.to(plan.device)  # parameters of methods that are new
        self.reduced = {n: m for n, m in self.variants.items() if isinstance(m, ReducedViT)}
        self.masked = plan.only is None or label in plan.only
        if plan.statistics and not self.reduced and not isinstance(named, Mapping):
            raise ValueError(f"{label} has no method, so there are no statistics of its tokens")
        if plan.pruning and self.masked and isinstance(model, ReducedViT):
            raise ValueError(
                f"{label} has its method {model.reducer!r}; pruning without training is of plain "
                "models"
            )
        if plan.occlusion and self.masked:
            check_ratios(plan.occlusion, model)
        self.inputs = Inputs.of(model)
        self.loader = Loader(
            limited(source, plan.limit, balanced=False),
            self.inputs.transform(),
            train=False,
            batch=plan.batch,
            workers=plan.workers,
            corrupt="fail" if plan.strict else "skip",
        )

    def parts(self, tokens: dict[tuple[str, str], TokenStatistics]) -> Iterator[pd.DataFrame]:
        """Measure everything except speed; token statistics are also kept as arrays."""
        plan = self.plan
        shared: dict[str, Any] = {"classes": self.classes, "precision": plan.precision}
        yield costs(self.variants, self._passes("accuracy"), **shared)
        untrained = [one for one in self.variants.values() if fresh(self.model, one)]
        for one in untrained:
            marked = {"method": name_of(one), "rate": rate_of(one)}
            yield frame(rows("accuracy", {"untrained": 1}, **marked))
        shared["seeds"] = plan.mask_seeds
        if plan.occlusion and self.masked:
            passes = self._passes("occlusion")
            yield occlusion(self.model, passes, ratios=plan.occlusion, **shared)
        if plan.pruning and self.masked:
            passes = self._passes("pruning without training")
            yield pruning(self.model, passes, rates=plan.pruning, **shared)
        if plan.statistics and self.reduced:
            passes = self._passes("statistics of tokens")
            for name, found in gather(self.reduced, passes, precision=plan.precision).items():
                tokens[self.label, name] = found
                yield found.table()

    def images(self, count: int) -> Tensor:
        """Return the first images as a batch, or all of them if there are fewer."""
        read: list[Tensor] = []
        batches = self._passes("reading")()
        for images, _, _ in batches:
            read.append(images)
            if sum(map(len, read)) >= count:
                break
        batches.close()  # type: ignore[attr-defined]  # ends the processes that read
        return torch.cat(read)[:count]

    def _passes(self, what: str) -> Callable[[], Iterator[Batch]]:
        """Return passes over the data as the model takes them, and report to ``progress``."""

        def once() -> Iterator[Batch]:
            title, total = f"{self.label}: {what}", len(self.loader)
            self.told(title, 0, total)
            found = device_batches(self.loader, self.inputs.mean, self.inputs.std, self.plan.device)
            for number, batch in enumerate(found, start=1):
                yield batch
                self.told(title, number, total)

        return once

    def about(self) -> dict[str, Any]:
        """Return facts of the model that its numbers depend on."""
        model = self.model
        backbone = backbone_of(model)
        return {
            "family": backbone.spec.family,
            "method": name_of(model) or None,
            "parameters": sum(p.numel() for p in model.parameters()),
            "classes": self.classes,
            "inputs": asdict(self.inputs),
            "unreadable": len(self.loader.unreadable),
        }
