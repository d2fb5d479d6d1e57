"""The recipe of a pipeline: stages in order, what they share, and what is measured at the end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate import config
from foveate.measure.cells import Cell
from foveate.measure.comparison import Measuring
from foveate.registry import suggest
from foveate.train.recipe import Data, Loop

__all__ = ["JOBS", "Measured", "Pipeline", "Planned", "Stage"]

JOBS = ("pretrain", "probe", "finetune", "reduce")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Stage:
    """One job of a pipeline.

    Attributes:
        name: name by which other stages refer to it.
        number: position, from 1.
        job: "pretrain", "probe", "finetune" or "reduce".
        recipe: a name or a file; None where the settings are the whole recipe.
        settings: nested changes of that recipe.
    """

    name: str
    number: int
    job: str
    recipe: str | None
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """Return the name of the stage's folder, which tables use too."""
        return f"{self.number}-{self.name}"

    @property
    def where(self) -> str:
        """Return the stage's place in the recipe, for messages."""
        return f"stages.{self.name}"

    @property
    def classifies(self) -> bool:
        """Tell whether the stage's model has classes."""
        return self.job in ("finetune", "reduce")


@dataclass(frozen=True)
class Planned:
    """A stage, ready to run.

    Attributes:
        stage: the stage of the pipeline.
        recipe: complete recipe of its job.
        start: stage whose model it starts from; None if it starts from elsewhere.
        teacher: stage whose model teaches; None if there is no such stage.
        cell: the same stage as a cell.
    """

    stage: Stage
    recipe: Any
    start: Planned | None
    teacher: Planned | None
    cell: Cell


@dataclass(kw_only=True)
class Measured(Measuring):
    """What is measured at the end, of every model that has classes.

    Attributes:
        rates: rates at which to evaluate the method of each reduce stage, besides its own rate.
        occlusion: shares of patches to drop from the images of fine-tuned models, for a curve of
            accuracy; an empty list measures none.
        speed: batch sizes at which all models are timed, taking turns in one run; an empty list
            times nothing.
    """

    rates: tuple[float, ...] = ()
    speed: tuple[int, ...] = (64,)


@dataclass(kw_only=True)
class Pipeline:
    """Jobs one after another, each in a run folder of its own.

    Attributes:
        stages: the stages by name, in order. Each holds "job" (not needed if its name is a job:
            pretrain, probe, finetune or reduce), "recipe" (one that ships, or a file) and changes
            of that recipe's settings, such as loop.epochs; without "recipe" the settings are the
            whole recipe. A stage starts from the model of the stage before it, unless its
            model.start names an earlier stage or a path (STAGE/teacher is the teacher of a
            pre-training that has one); null takes what the recipe says. teacher and
            distill.teacher may name an earlier stage too.
        data: settings of the group data that all stages share.
        loop: settings of the group loop that all stages except probe share.
        evaluate: what is measured at the end.
    """

    stages: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    evaluate: Measured = field(default_factory=Measured)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must name at least one stage")
        if not any(stage.classifies for stage in self.in_order):
            raise ValueError(
                "no stage is a finetune or reduce one, so there is nothing to evaluate"
            )
        for name, cls in (("data", Data), ("loop", Loop)):
            config.parse(cls, getattr(self, name), (), name)

    @property
    def in_order(self) -> list[Stage]:
        """Return the stages, the first one first."""
        return [_stage(*item, n) for n, item in enumerate(self.stages.items(), start=1)]


def _stage(name: str, given: Any, number: int) -> Stage:
    where = f"stages.{name}"
    if not _NAME.fullmatch(str(name)):
        raise ValueError(f"{where}: a stage names a folder, so it is of letters, digits and _")
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must hold keys and values, got {given!r}")
    settings = dict(given)
    job, recipe = settings.pop("job", name), settings.pop("recipe", None)
    if job not in JOBS:
        if "job" not in given:
            raise ValueError(f"{where} must say its job: {', '.join(JOBS)}")
        raise ValueError(f"{where}: {suggest('job', str(job), list(JOBS))}")
    if not (recipe is None or isinstance(recipe, str)):
        raise ValueError(
            f"{where}.recipe must be a name or a file, got {recipe!r}: settings stand beside it"
        )
    return Stage(str(name), number, job, recipe, settings)
