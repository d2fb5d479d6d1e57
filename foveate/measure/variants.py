"""List what to evaluate of one model: the model as it is, and methods on it at several rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from foveate import api
from foveate.core import ReducedViT, Reducer
from foveate.registry import make, method_class, parse

__all__ = ["DENSE", "at_rate", "fresh", "variants"]

DENSE = "dense"


def variants(
    model: nn.Module, methods: Sequence[str] = (), rates: Sequence[float] = (), *, seed: int = 0
) -> dict[str, nn.Module]:
    """Return all variants of one model to evaluate, by name, the dense model first.

    Methods that name their rate are used as they are, the others at each of ``rates``. A model from
    ``foveate.apply`` comes with its own method, and others of the same name take that one's
    parameters.

    Args:
        model: a plain model or one from ``foveate.apply``.
        methods: methods to put on it.
        rates: rates for methods that name none; without rates a method has its default.
        seed: seed of new parameters.
    """
    found: dict[str, nn.Module] = {DENSE: model}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reduced: list[ReducedViT] = []
        if isinstance(model, ReducedViT):
            found = {DENSE: api.unwrap(model), repr(model.reducer): model}
            reduced = [at_rate(model, None, rate) for rate in rates if not methods]
        for text in methods:
            reduced += _of_method(model, text, rates)
    for one in reduced:
        found.setdefault(repr(one.reducer), one)
    return found


def fresh(given: nn.Module, variant: nn.Module) -> bool:
    """Tell whether a method's parameters are new and untrained."""
    if isinstance(given, ReducedViT) or not isinstance(variant, ReducedViT):
        return False
    return next(variant.reducer.parameters(), None) is not None


def at_rate(model: nn.Module, method: str | None, rate: float) -> ReducedViT:
    """Put a method on a model at another rate, with the same weights.

    Args:
        model: a plain model, or one from ``foveate.apply``, whose trained parameters are kept.
        method: such as "evit" or "evit(rest='drop')"; None is the model's own.
        rate: keep, r or K, whatever the method has.
    """
    if method is not None:
        given = parse(method)
    elif isinstance(model, ReducedViT):
        given = model.reducer
    else:
        raise ValueError("the model has no method of its own: name one")
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
    return _put(model, reducer)


def _of_method(model: nn.Module, text: str, rates: Sequence[float]) -> list[ReducedViT]:
    name = re.match(r"\s*(\w+)\s*(\(|$)", text)
    rate = method_class(name[1]).rate if name and "+" not in text else ""
    if rates and rate and not re.search(rf"\b{rate}\s*=", text):
        return [at_rate(model, text, value) for value in rates]
    return [_put(model, parse(text))]


def _put(model: nn.Module, reducer: Reducer) -> ReducedViT:
    """Put a method on a plain model, or on another one with the parameters of its own."""
    if not isinstance(model, ReducedViT):
        return api.apply(model, reducer, check=False).eval()
    if reducer.name != model.reducer.name:
        raise ValueError(f"the model has its own method {model.reducer!r}: give no other")
    reduced = api.apply(api.unwrap(model), reducer, check=False)
    reduced.reducer.load_state_dict(model.reducer.state_dict())
    return reduced.eval()
