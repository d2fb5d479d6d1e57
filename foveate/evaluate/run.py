"""Evaluate models on a data set: whatever was asked for, in as few passes as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backbones import backbone_for
from foveate.bench import machine
from foveate.bench.result import LEAST_ROUNDS
from foveate.core import ReducedViT
from foveate.core.schedule import check_choice
from foveate.data import Inputs, Loader, Source, device_batches, limited, open_images
from foveate.evaluate.answers import PRECISIONS, Batch
from foveate.evaluate.occlusion import check_ratios, check_seeds, occlusion
from foveate.evaluate.pruning import check_rates, pruning
from foveate.evaluate.rates import measure, variants
from foveate.evaluate.report import Entry, Report
from foveate.evaluate.speed import speeds
from foveate.evaluate.statistics import gather

__all__ = ["Plan", "Progress", "evaluate"]

# Told what is done, how many steps of it are over, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate, and on what.

    Accuracy and multiply-adds are always measured: of every dense model and every method on it.

    Attributes:
        data: as ``foveate.data.open_source`` takes it.
        split: "train", "val", "test" or "all"; None takes the first that there is of "test", "val"
            and "all".
        val_share: share that training held out, for "val" of data that have no such split.
        split_seed: of that division.
        methods: to put on plain models; see ``variants``.
        rates: for methods that do not name theirs, and for models that come with one.
        occlusion: shares of patches to drop from the image; none measures no curve.
        pruning: rates of pruning without training; none does not.
        mask_seeds: how many seeds both have.
        statistics: gather those of the tokens, for every method.
        speed: time everything in one interleaved run.
        rounds: of that run; fewer than 30 are a trial.
        batch: images a call.
        workers: processes that read images.
        limit: use so many images, evenly spaced.
        device: where models and images go.
        precision: "fp32", or "bf16" for automatic mixed precision.
        strict: an image that cannot be read is an error.
        seed: of new parameters, and of the order within rounds.
    """

    data: str
    split: str | None = None
    val_share: float = 0.1
    split_seed: int = 0
    methods: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    occlusion: tuple[float, ...] = ()
    pruning: tuple[float, ...] = ()
    mask_seeds: int = 3
    statistics: bool = False
    speed: bool = False
    rounds: int = LEAST_ROUNDS
    batch: int = 64
    workers: int = 0
    limit: int | None = None
    device: str = "cpu"
    precision: str = "fp32"
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_seeds(self.mask_seeds)
        if self.pruning:
            check_rates(self.pruning)
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        machine.check_device(self.device)


def evaluate(
    models: Mapping[str, nn.Module],
    plan: Plan,
    *,
    command: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Evaluate models on one data set, each with its own preprocessing.

    Args:
        models: plain ViTs or models from ``foveate.apply``, by the names that tables give them;
            they are moved to the plan's device.
        plan: what to do.
        command: what was typed, for the record.
        progress: told how far everything is.
    """
    told = progress or (lambda title, done, total: None)
    source = open_images(plan.data, plan.split, share=plan.val_share, seed=plan.split_seed)
    plan = replace(plan, split=source.split)
    jobs = [_Job(label, model, source, plan, told) for label, model in models.items()]
    report = Report(
        command, machine.commit(), machine.facts(torch.device(plan.device).type), _record(plan)
    )
    for job in jobs:
        report.entries.append(job.entry())
    if plan.speed:
        timed = speeds(
            {job.label: job.variants for job in jobs},
            {job.label: job.first() for job in jobs},
            rounds=plan.rounds,
            precision=plan.precision,
            seed=plan.seed,
            progress=lambda done, total: told("speed", done, total),
        )
        for entry in report.entries:
            entry.speeds = timed[entry.label]
    return report


def _record(plan: Plan) -> dict[str, Any]:
    """The plan, with seeds instead of their number."""
    found = asdict(plan)
    found["mask_seeds"] = list(check_seeds(plan.mask_seeds))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


class _Job:
    """One model and its way through the plan. What can be wrong is said when it is made."""

    def __init__(
        self, label: str, model: nn.Module, source: Source, plan: Plan, told: Progress
    ) -> None:
        self.label, self.model, self.plan, self.told = label, model.to(plan.device), plan, told
        self.classes = None if source.classes is None else len(source.classes)
        self.variants, self.untrained = variants(model, plan.methods, plan.rates, seed=plan.seed)
        self.reduced = {n: m for n, m in self.variants.items() if isinstance(m, ReducedViT)}
        if plan.statistics and not self.reduced:
            raise ValueError(f"{label} has no method, so there are no statistics of its tokens")
        if plan.pruning and isinstance(model, ReducedViT):
            raise ValueError(
                f"{label} has its method {model.reducer!r}; pruning without training is of plain "
                "models"
            )
        if plan.occlusion:
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

    def entry(self) -> Entry:
        """Everything but speed."""
        plan, found = self.plan, Entry(self.label, self._about())
        shared: dict[str, Any] = {"classes": self.classes, "precision": plan.precision}
        rows = measure(self.variants, self._passes("accuracy"), **shared)
        found.rows = {n: replace(row, untrained=n in self.untrained) for n, row in rows.items()}
        shared["seeds"] = plan.mask_seeds
        if plan.occlusion:
            passes = self._passes("occlusion")
            found.occlusion = occlusion(self.model, passes, ratios=plan.occlusion, **shared)
        if plan.pruning:
            passes = self._passes("pruning without training")
            found.pruning = pruning(self.model, passes, rates=plan.pruning, **shared)
        if plan.statistics:
            passes = self._passes("statistics of tokens")
            found.statistics = gather(self.reduced, passes, precision=plan.precision)
        found.about["unreadable"] = len(self.loader.unreadable)
        return found

    def first(self) -> Tensor:
        """The first batch of images."""
        batches = self._passes("reading")()
        images, _, _ = next(batches)
        batches.close()  # type: ignore[attr-defined]  # ends the processes that read
        return images

    def _passes(self, what: str) -> Callable[[], Iterator[Batch]]:
        """Passes over the data as the model takes them, told to ``progress``."""

        def once() -> Iterator[Batch]:
            title, total = f"{self.label}: {what}", len(self.loader)
            self.told(title, 0, total)
            found = device_batches(self.loader, self.inputs.mean, self.inputs.std, self.plan.device)
            for number, batch in enumerate(found, start=1):
                yield batch
                self.told(title, number, total)

        return once

    def _about(self) -> dict[str, Any]:
        """Facts of the model that its numbers depend on."""
        model = self.model
        backbone = model.backbone if isinstance(model, ReducedViT) else backbone_for(model)
        return {
            "family": backbone.spec.family,
            "method": repr(model.reducer) if isinstance(model, ReducedViT) else None,
            "parameters": sum(p.numel() for p in model.parameters()),
            "classes": self.classes,
            "inputs": asdict(self.inputs),
        }
