"""Accuracy and multiply-adds: of several models in one pass, and of one method at several rates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate import api, facts
from foveate.core import ReducedViT, Trace
from foveate.evaluate.answers import Accuracy, Batches, Tally, evaluating, logits_of
from foveate.registry import make, method_class, parse

__all__ = ["DENSE", "Row", "at_rate", "by_rate", "measure", "variants"]

DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One model, or one method on it: how often it is right and what that costs.

    Attributes:
        name: "dense" or the method with its options.
        accuracy: right answers.
        method: name of the method, "" for a model without one.
        rate: the method's rate, None where it has none.
        macs: multiply-adds of an image; None for models that foveate cannot count.
        dense_macs: those of the model without the method.
        tokens: that the last block feeds forward, mean over images, prefix included.
        counted: "exact", or "measured" on every image where counts differ; None if not at all.
        untrained: the method has parameters and nobody trained them.
    """

    name: str
    accuracy: Accuracy
    method: str = ""
    rate: float | tuple[float, ...] | None = None
    macs: float | None = None
    dense_macs: float | None = None
    tokens: float | None = None
    counted: str | None = None
    untrained: bool = False


class _Meter:
    """Answers and costs of one model, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.images = 0
        self.macs = self.tokens = 0.0
        self.last: facts.Count | None = None

    def answer(self, images: Tensor) -> Tensor:
        """Logits; where counts depend on the image, those of these images are added up."""
        model = self.model
        if isinstance(model, ReducedViT) and not model.reducer.fixed_count:
            trace = model.trace(images)
            self._add(_measured(model, trace, images), len(images))
            return trace.logits
        if self.last is None and self.images == 0:
            self._add(_counted(model, (images.shape[2], images.shape[3])), len(images))
        return logits_of(model(images))

    def _add(self, counted: facts.Count | None, images: int) -> None:
        self.last = counted
        self.images += images
        if counted is not None:
            self.macs += images * counted.macs
            self.tokens += images * counted.tokens[-1]

    def row(self, name: str, accuracy: Accuracy) -> Row:
        """What came of it."""
        method, rate = "", None
        if isinstance(self.model, ReducedViT):
            reducer = self.model.reducer
            method, rate = reducer.name, getattr(reducer, reducer.rate or "", None)
        if self.last is None:
            return Row(name, accuracy, method, rate)
        return Row(
            name,
            accuracy,
            method,
            rate,
            macs=self.macs / self.images,
            dense_macs=self.last.dense_macs,
            tokens=self.tokens / self.images,
            counted=self.last.how,
        )


def _measured(model: ReducedViT, trace: Trace, images: Tensor) -> facts.Count:
    try:
        return facts.count(model, trace=trace)
    except ValueError:  # a method that does not work out its own cost is counted by running
        return facts.count(model, images=images)


def _counted(model: nn.Module, size: tuple[int, int]) -> facts.Count | None:
    try:
        return facts.count(model, size)
    except ValueError:  # no plain ViT, which has an accuracy all the same
        return None


def measure(
    models: Mapping[str, nn.Module],
    batches: Batches,
    *,
    classes: int | None = None,
    precision: str = "fp32",
) -> dict[str, Row]:
    """Accuracy, multiply-adds and tokens of several models in one pass over the data.

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
    with evaluating(*models.values(), precision=precision):
        for images, labels, _ in batches():
            for name, meter in meters.items():
                tallies[name].add(meter.answer(images), labels)
    return {name: meter.row(name, tallies[name].result()) for name, meter in meters.items()}


def by_rate(
    model: nn.Module,
    method: str | None,
    rates: Sequence[float],
    batches: Batches,
    *,
    classes: int | None = None,
    precision: str = "fp32",
) -> list[Row]:
    """Accuracy and multiply-adds at several rates of a method: keep, r or K, whatever it has.

    Args:
        model: a plain ViT; or a model from ``foveate.apply``, whose own method is then taken with
            the parameters that it has.
        method: such as "evit" or "evit(rest='drop')"; None with a model that has its own.
        rates: at least one.
        batches: gives a pass over the data.
        classes: how many the data set has.
        precision: as ``accuracy`` takes it.
    """
    models = [at_rate(model, method, rate) for rate in rates]
    named = {repr(reduced.reducer): reduced for reduced in models}
    rows = measure(named, batches, classes=classes, precision=precision)
    return [replace(row, untrained=_fresh(model, named[name])) for name, row in rows.items()]


def at_rate(model: nn.Module, method: str | None, rate: float) -> ReducedViT:
    """A method at another rate, on the same weights; trained parameters of it are kept."""
    if isinstance(model, ReducedViT):
        if method is not None:
            raise ValueError(
                f"the model has its own method {model.reducer!r}; take {method!r} with the model "
                "that foveate.unwrap() gives"
            )
        given = model.reducer
    else:
        if method is None:
            raise ValueError("the model has no method of its own: name one")
        given = parse(method)
    if not given.rate:
        raise ValueError(f"{given!r} has no rate that could be set to {rate:g}")
    if given.gated and not given.fixed_count:
        raise ValueError(
            f"the gates of {given!r} decide by themselves how much they keep, so another rate "
            f"changes nothing; gate='topk' keeps as much as {given.rate} says"
        )
    config: dict[str, Any] = given.config()
    whole = isinstance(config[given.rate], int) and float(rate).is_integer()
    try:
        reducer = make(given.name, {**config, given.rate: int(rate) if whole else rate})
    except ValueError as error:
        raise ValueError(f"{given.name} at rate {rate:g}: {error}") from None
    if not isinstance(model, ReducedViT):
        return api.apply(model, reducer, check=False)
    reduced = api.apply(api.unwrap(model), reducer, check=False)
    reduced.reducer.load_state_dict(given.state_dict())
    return reduced


def variants(
    model: nn.Module, methods: Sequence[str] = (), rates: Sequence[float] = (), *, seed: int = 0
) -> tuple[dict[str, nn.Module], frozenset[str]]:
    """Everything that is to be evaluated of one model, by name, and which of it is untrained.

    The dense model comes first. Methods that name their rate are taken as they are, the others at
    every one of ``rates``. A model from ``foveate.apply`` comes with its own method.

    Args:
        model: a plain model or one from ``foveate.apply``.
        methods: to put on a plain model.
        rates: for methods that do not name theirs; none takes a method's default.
        seed: of parameters that are new.
    """
    if isinstance(model, ReducedViT) and methods:
        raise ValueError(f"the model was saved with its method {model.reducer!r}; name no other")
    found: dict[str, nn.Module] = {DENSE: model}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, ReducedViT):
            found = {DENSE: api.unwrap(model), repr(model.reducer): model}
            reduced = [at_rate(model, None, rate) for rate in rates]
        else:
            reduced = [one for text in methods for one in _of_method(model, text, rates)]
    for one in reduced:
        found.setdefault(repr(one.reducer), one)
    return found, frozenset(name for name, one in found.items() if _fresh(model, one))


def _of_method(model: nn.Module, text: str, rates: Sequence[float]) -> list[ReducedViT]:
    name = re.match(r"\s*(\w+)\s*(\(|$)", text)
    rate = method_class(name[1]).rate if name and "+" not in text else ""
    if rates and rate and not re.search(rf"\b{rate}\s*=", text):
        return [at_rate(model, text, value) for value in rates]
    return [api.apply(model, text, check=False)]


def _fresh(given: nn.Module, variant: nn.Module) -> bool:
    """Whether a method's parameters were made just now."""
    if isinstance(given, ReducedViT) or not isinstance(variant, ReducedViT):
        return False
    return next(variant.reducer.parameters(), None) is not None
