"""What a comparison is made of: base models, methods, rates and seeds under one protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from foveate import config
from foveate.evaluate import Plan
from foveate.registry import parse, suggest

__all__ = [
    "Asked",
    "Base",
    "Comparison",
    "Resources",
    "Trained",
    "Untrained",
    "at_rate",
]

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
RATE = "{rate}"
SEED = "{seed}"


@dataclass(kw_only=True)
class Base:
    """A base model, one for each seed.

    Attributes:
        recipe: of fine-tuning, a name or a file; its model is trained.
        open: a checkpoint or folder instead, taken as it is. With ``{seed}`` in it there is one
            for each seed, otherwise all seeds share it.
        start: an earlier base model, of the same seed; None leaves the start of the recipe.
        settings: changes of the recipe, such as ``masking.ratios=[]``.
    """

    recipe: str | None = None
    open: str | None = None
    start: str | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.open is None):
            raise ValueError("either recipe or open says where the model comes from, not both")
        if self.open is not None and (self.start is not None or self.settings):
            raise ValueError(f"open={self.open} is not trained: leave start and settings out")

    @property
    def shared(self) -> bool:
        """Whether all seeds have the same weights."""
        return self.open is not None and SEED not in self.open


@dataclass(kw_only=True)
class Trained:
    """A method that is trained from base models, at every rate.

    Attributes:
        recipe: of reducing, a name or a file.
        method: with ``{rate}`` where the rate goes, such as "evit(keep={rate})".
        starts: the base models.
        rates: whatever the method calls keep, r or K; none for a method without.
        settings: changes of the recipe.
    """

    recipe: str
    method: str
    starts: tuple[str, ...]
    rates: tuple[float, ...] = ()
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_methods((self.method,), self.rates)


@dataclass(kw_only=True)
class Untrained:
    """Methods that are applied to base models as they are.

    Attributes:
        methods: each with ``{rate}`` where the rate goes, or without one.
        starts: the base models.
        rates: for the methods that have a place for it.
    """

    methods: tuple[str, ...]
    starts: tuple[str, ...]
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_methods(self.methods, self.rates)

    def written(self) -> tuple[str, ...]:
        """Every method at every rate."""
        found = [at_rate(text, rate) for text in self.methods for rate in self.rates or (0.0,)]
        return tuple(dict.fromkeys(found))


@dataclass(kw_only=True)
class Asked:
    """What is measured. Accuracy and multiply-adds are, of every model and method.

    Attributes:
        models: base models of which occlusion and pruning are measured; None is all.
        occlusion: shares of patches to drop; none measures no curve.
        pruning: shares that each stage of pruning without training keeps; none does not.
        mask_seeds: how many seeds both have, for each model.
        statistics: of tokens, for every method.
        speed: of every method over its dense model, interleaved.
        rounds: of that run.
        batch: images a call.
        workers: processes that read images; 0 reads in the process itself.
        limit: use so many images; None leaves what the recipes say.
        device: "auto", "cpu" or "cuda".
        precision: "fp32" or "bf16".
    """

    models: tuple[str, ...] | None = None
    occlusion: tuple[float, ...] = ()
    pruning: tuple[float, ...] = ()
    mask_seeds: int = 3
    statistics: bool = True
    speed: bool = False
    rounds: int = 30
    batch: int = 64
    workers: int = 0
    limit: int | None = None
    device: str = "auto"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"evaluate.device must be auto, cpu or cuda, got {self.device!r}")
        for ratio in self.occlusion:
            if not 0 <= ratio <= 1:
                raise ValueError(f"evaluate.occlusion must lie in [0, 1], got {ratio}")
        for name in ("rounds", "batch", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluate.{name} must be at least 1, got {value}")
        Plan(  # refuses what it would refuse after hours of training
            data="", pruning=self.pruning, mask_seeds=self.mask_seeds, precision=self.precision
        )


@dataclass(kw_only=True)
class Resources:
    """What each cell takes, for --launcher ray."""

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"resources.{name} must be at least 0, got {getattr(self, name)}")


@dataclass(kw_only=True)
class Comparison:
    """Methods times rates times seeds times base models.

    Attributes:
        seeds: of training; each goes all the way from the first base model to the last method.
        settings: changes of every recipe, before its own.
        models: base models by name, see ``Base``; one starts from those above it alone.
        methods: methods that are trained, by name, see ``Trained``.
        untrained: methods that are only applied.
        evaluate: what is measured.
        data: what is evaluated on, as ``foveate.data.open_source`` takes it; None is what the
            recipes evaluate on, if that is one and the same.
        resources: what each cell takes of a cluster.
    """

    models: dict[str, Any]
    methods: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: tuple[str, ...] = ()
    untrained: Untrained | None = None
    evaluate: Asked = field(default_factory=Asked)
    data: str | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers from 0, got {self.seeds}")
        if not self.models:
            raise ValueError("models must name at least one base model")
        # config reads no dictionaries of dataclasses with near misses, so their values come here.
        self.models = _parts(Base, "models", self.models)
        self.methods = _parts(Trained, "methods", self.methods)
        earlier: list[str] = []
        for name, base in self.models.items():
            if base.start is not None:
                _known(f"start of models.{name}, an earlier model", (base.start,), earlier)
            earlier.append(name)
        for name, method in self.methods.items():
            _known(f"model in methods.{name}.starts", method.starts, earlier)
        if self.untrained is not None:
            _known("model in untrained.starts", self.untrained.starts, earlier)
        _known("model in evaluate.models", self.evaluate.models or (), earlier)
        if self.data is None and any(base.open is not None for base in self.models.values()):
            raise ValueError(
                "a model is opened and no recipe says what it is evaluated on: give data, such as "
                "folder:photos"
            )

    def pruned(self, name: str) -> bool:
        """Whether occlusion and pruning of a base model are measured."""
        return self.evaluate.models is None or name in self.evaluate.models


def at_rate(text: str, rate: float) -> str:
    """A method with its rate filled in: whole numbers without a point."""
    return text.replace(RATE, f"{rate:g}")


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
            said = str(error)
            raise ValueError(said if where in said else f"{where}.{name}: {said}") from None
    return found


def _check_methods(methods: tuple[str, ...], rates: tuple[float, ...]) -> None:
    """Parse each method at each rate."""
    for text in methods:
        if RATE in text and not rates:
            raise ValueError(f"{text!r} has a place for a rate, and rates gives none")
        if RATE not in text and len(rates) > 1 and len(methods) == 1:
            raise ValueError(f"{text!r} has no {{rate}} where one of several rates would go")
        for rate in rates or (0.0,):
            parse(at_rate(text, rate))
    if len(set(rates)) < len(rates):
        raise ValueError(f"rates must differ from each other, got {list(rates)}")


def _known(kind: str, names: tuple[str, ...], legal: list[str]) -> None:
    for name in names:
        if name not in legal:
            raise ValueError(suggest(kind, name, legal))
