"""The settings of a comparison: models, methods, rates and seeds under one protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from foveate import config
from foveate.core.schedule import check_choice
from foveate.measure.run import Plan
from foveate.mim.weights import TEACHER_FILE
from foveate.registry import parse, suggest

__all__ = [
    *("DENSE_JOBS", "Asked", "Comparison", "Entry", "Resources", "Trained", "at_rate"),
    "start_of",
]

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
DENSE_JOBS = ("detect", "segment")  # jobs whose models have an average precision or a mean IoU
CLASSLESS = ("pretrain", "probe")  # jobs whose models are not evaluated
JOBS = ("finetune", "reduce", *CLASSLESS, *DENSE_JOBS)
_TEACHER = "/teacher"  # after the name of a pre-training
RATE = "{rate}"
SEED = "{seed}"


@dataclass(kw_only=True)
class Entry:
    """A model, one for each seed: trained by a recipe of any job, or opened.

    Attributes:
        job: "finetune" (unless another one is given), "reduce", "pretrain", "probe", "detect" or
            "segment".
        recipe: of the job, a name or a file.
        open: a checkpoint or folder instead, taken as it is. With ``{seed}`` in it there is one
            for each seed, otherwise all seeds share it. Methods that are trained from a detector
            or segmenter need its job beside it.
        like: an earlier model whose job, recipe, start, settings, seeds and variants are taken over
            unless given. Settings take precedence over those of that model. Pre-training is
            compared with the model at the beginning of such a chain.
        start: an earlier model, of the same seed, or ``NAME/teacher`` for the teacher of a
            pre-training that has one; None leaves the start of the recipe.
        teacher: likewise: the model that "finetune" distils from, or "reduce" compares with.
        settings: changes of the recipe, such as ``masking.ratios=[]``.
        seeds: instead of those of the comparison.
        once: train it with the first seed alone; what starts from it has all seeds.
        variants: methods to evaluate on the model as it is, such as "evit(keep=0.7)". On a model
            with a method they are of the same name and take its parameters.
        processes: that train together; None is what the resources say.
    """

    job: str | None = None
    recipe: str | None = None
    open: str | None = None
    like: str | None = None
    start: str | None = None
    teacher: str | None = None
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    once: bool = False
    variants: tuple[str, ...] = ()
    processes: int | None = None

    def __post_init__(self) -> None:
        if self.once and self.seeds is not None:
            raise ValueError("once=true trains with one seed: leave seeds out")
        if (self.recipe is None and self.like is None) == (self.open is None):
            raise ValueError("either recipe or open says where the model comes from, not both")
        trained = any((self.start, self.teacher, self.settings, self.like))
        trained = trained or self.job not in (None, *DENSE_JOBS)
        if self.open is not None and trained:
            raise ValueError(
                f"open={self.open} is not trained: leave like, start, teacher and settings out, "
                f"and job too unless it is {' or '.join(DENSE_JOBS)}"
            )
        check_choice("job", self.job, (None, *JOBS))
        for text in self.variants:
            parse(text)
        if self.variants and self.job in CLASSLESS:
            raise ValueError(f"a model of job={self.job} has no classes: leave variants out")

    @property
    def shared(self) -> bool:
        """Tell whether all seeds have the same weights."""
        return self.once or (self.open is not None and SEED not in self.open)

    @property
    def judged_by(self) -> str | None:
        """Return the part of the table that says how good it is; None for features alone."""
        if self.job in CLASSLESS:
            return None
        return "dense" if self.job in DENSE_JOBS else "accuracy"

    def over(self, base: Entry) -> Entry:
        """Return the entry with what another one adds to it."""
        return replace(
            self,
            job=self.job or base.job,
            recipe=self.recipe or base.recipe,
            start=self.start or base.start,
            teacher=self.teacher or base.teacher,
            settings=(*base.settings, *self.settings),
            seeds=self.seeds or base.seeds,
            variants=self.variants or base.variants,
            processes=self.processes or base.processes,
        )


@dataclass(kw_only=True)
class Trained:
    """A method that is trained from models, at every rate.

    Attributes:
        recipe: recipe of the job "reduce", or of the models' own job if that is "detect" or
            "segment"; a name or a file.
        method: method, with ``{rate}`` in the place of its rate, such as "evit(keep={rate})".
        starts: names of the models to train from.
        rates: rates (keep, r or K of the method); empty for a method without a rate.
        settings: changes of the recipe.
        seeds: seeds, instead of those of the models.
        processes: number of processes that train together; None takes the number in the resources.
    """

    recipe: str
    method: str
    starts: tuple[str, ...]
    rates: tuple[float, ...] = ()
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    processes: int | None = None

    def __post_init__(self) -> None:
        if RATE in self.method and not self.rates:
            raise ValueError(f"{self.method!r} has a place for a rate, and rates gives none")
        if RATE not in self.method and len(self.rates) > 1:
            raise ValueError(f"{self.method!r} has no {{rate}} where one of several rates would go")
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates must differ from each other, got {list(self.rates)}")
        for rate in self.rates or (0.0,):
            parse(at_rate(self.method, rate))


@dataclass(kw_only=True)
class Measuring:
    """How models are measured, in a comparison and at the end of a pipeline.

    Attributes:
        occlusion: shares of patches to drop, for a curve of accuracy; an empty list measures none.
        mask_seeds: number of random masks with which occlusion is measured, for each model.
        speed: batch sizes at which everything is timed, taking turns; an empty list times nothing.
        rounds: number of timed rounds; fewer than 30 are only a trial.
        batch: number of images in one pass.
        workers: number of processes that read images; 0 reads them in the process itself.
        limit: number of images to use; None takes all.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        precision: "fp32" or "bf16".
    """

    occlusion: tuple[float, ...] = ()
    mask_seeds: int = 3
    speed: tuple[int, ...] = ()
    rounds: int = 30
    batch: int = 64
    workers: int = 0
    limit: int | None = None
    device: str = "auto"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_choice("evaluate.device", self.device, ("auto", "cpu", "cuda"))
        self.plan(
            data="", workers=self.workers
        )  # refuses what it would refuse after hours of training

    def plan(self, **given: Any) -> Plan:
        """Return the plan of an evaluation; ``given`` says on which images and models."""
        return Plan(**{**vars(self), **given})


@dataclass(kw_only=True)
class Asked(Measuring):
    """What is measured besides accuracy and multiply-adds, which always are.

    Attributes:
        models: models whose occlusion and pruning are measured; None is all.
        pruning: shares of tokens that each stage of pruning without training keeps; an empty list
            does not prune.
        mask_seeds: number of random masks for occlusion and pruning, for each model.
        statistics: count the tokens of every method; detectors and segmenters have their own.
        speed: batch sizes at which every method is timed beside its dense model, taking turns.
        calibration: number of training images over which gates of detectors and segmenters are
            shifted; the result stands beside the method without the shift.
        together: evaluate all models in one process, so that all are timed in the same run.
        limit: number of images to use; None takes as many as the recipes say.
    """

    models: tuple[str, ...] | None = None
    pruning: tuple[float, ...] = ()
    statistics: bool = True
    calibration: int = 0
    together: bool = False

    def plan(self, **given: Any) -> Plan:
        """Return the plan of an evaluation; ``given`` holds what depends on the cell."""
        names = (
            *("mask_seeds", "speed", "rounds", "batch", "limit", "precision", "statistics"),
            *("calibration", "occlusion", "pruning"),
        )
        shared = {name: getattr(self, name) for name in names}
        return Plan(**{**shared, **given})


@dataclass(kw_only=True)
class Resources:
    """What each cell needs.

    Attributes:
        cpus: processor cores for each process, on a cluster.
        gpus: graphics cards for each process, on a cluster; may be a part of one.
        processes: number of processes that train together, started by torchrun.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"resources.{name} must be at least 0, got {getattr(self, name)}")
        if self.processes < 1:
            raise ValueError(f"resources.processes must be at least 1, got {self.processes}")


@dataclass(kw_only=True)
class Comparison:
    """A comparison, as its YAML file describes it.

    Attributes:
        models: models by name; each stands after those that it names.
        methods: methods that are trained from models, by name.
        seeds: seeds of the trainings.
        settings: changes of every recipe of finetune, reduce and pretrain; those of a model or
            method take precedence.
        evaluate: what is measured.
        data: data set to evaluate on, as ``foveate.data.open_source`` takes it; None takes that of
            the recipes, if they all have the same.
        resources: what each cell needs.
    """

    models: dict[str, Any]
    methods: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: tuple[str, ...] = ()
    evaluate: Asked = field(default_factory=Asked)
    data: str | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        if not self.models:
            raise ValueError("models must name at least one model")
        # config reads no dictionaries of dataclasses with near misses, so their values come here.
        self.models = _parts(Entry, "models", self.models)
        self.methods = _parts(Trained, "methods", self.methods)
        earlier: list[str] = []
        entry: Entry
        for name, entry in self.models.items():
            start = None if entry.start is None else start_of(entry.start)[0]
            given = {"start": start, "teacher": entry.teacher, "like": entry.like}
            for what, value in given.items():
                if value is not None:
                    _known(f"{what} of models.{name}, an earlier model", (value,), earlier)
            earlier.append(name)
            _check_seeds(self.seeds_of(name))
        for name, method in self.methods.items():
            _known(f"model in methods.{name}.starts", method.starts, earlier)
            _check_seeds(method.seeds or self.seeds)
        _known("model in evaluate.models", self.evaluate.models or (), earlier)
        opened = [one for one in self.models.values() if one.open is not None]
        if self.data is None and opened:
            raise ValueError(
                "a model is opened and no recipe says what it is evaluated on: give data, such as "
                "folder:photos"
            )

    def entry(self, name: str) -> Entry:
        """Return a model's entry, with what it takes over from others."""
        entry: Entry = self.models[name]
        if entry.like is not None:
            entry = entry.over(self.entry(entry.like))
        return replace(entry, job=entry.job or (None if entry.open else "finetune"))

    def seeds_of(self, name: str) -> tuple[int | None, ...]:
        """Return the seeds of a model; None alone where all seeds share it."""
        entry = self.entry(name)
        return (None,) if entry.shared else entry.seeds or self.seeds

    def seed_of(self, key_seed: int | None) -> int:
        """Return the number that a training draws by: that of its seed, or of one for all."""
        return self.seeds[0] if key_seed is None else key_seed

    def job_from(self, name: str) -> str:
        """Return the job that trains a method from a model."""
        job = self.entry(name).job
        return job if job in DENSE_JOBS else "reduce"

    def seeds_from(self, name: str, method: Trained) -> tuple[int, ...]:
        """Return the seeds of a method that is trained from a model."""
        entry = self.entry(name)
        if method.seeds is not None:
            return method.seeds
        return entry.seeds if entry.seeds and not entry.shared else self.seeds

    def root(self, name: str) -> str:
        """Return the model at the beginning of the chain of ``like`` that a model stands in."""
        like = self.models[name].like
        return name if like is None else self.root(like)

    def masked(self, name: str) -> bool:
        """Tell whether occlusion and pruning of a model are measured."""
        return self.evaluate.models is None or name in self.evaluate.models


def start_of(text: str) -> tuple[str, str]:
    """Return the name that a start gives, and the file in that run's folder; "" is its model."""
    name = text.removesuffix(_TEACHER)
    return name, TEACHER_FILE if name != text else ""


def at_rate(text: str, rate: float) -> str:
    """Return a method with its rate filled in: whole numbers without a point."""
    return text.replace(RATE, f"{rate:g}")


def _check_seeds(seeds: Sequence[int | None]) -> None:
    numbers = [seed for seed in seeds if seed is not None]
    if not seeds or min(numbers, default=0) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers from 0, got {seeds}")


def _parts(cls: type[_T], where: str, given: Mapping[str, Any]) -> dict[str, _T]:
    found = {}
    for name, value in given.items():
        if not _NAME.fullmatch(str(name)):
            raise ValueError(
                f"{where}: {name!r} names a folder, so it must be of letters, digits and _.+=-"
            )
        if isinstance(value, cls):
            found[str(name)] = value
            continue
        if value is None or not isinstance(value, Mapping):
            raise ValueError(f"{where}.{name} must hold keys and values, got {value!r}")
        try:
            found[str(name)] = config.parse(cls, value, (), f"{where}.{name}")
        except ValueError as error:
            text = str(error)
            raise ValueError(text if where in text else f"{where}.{name}: {text}") from None
    return found


def _known(kind: str, names: tuple[str, ...], legal: list[str]) -> None:
    for name in names:
        if name not in legal:
            raise ValueError(suggest(kind, name, legal))
