"""Budgets: find the rate at which a method costs a given number of multiply-adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from foveate.core.backbone import Backbone
from foveate.core.cost import cost, run_on_meta
from foveate.core.reducer import Reducer

__all__ = ["parse_budget", "priced", "rate_for", "solve_budget"]

_TOLERANCE = 0.01  # of the budget
_GOOD = 0.0025  # of the budget: within it, the rate with the fewest digits is chosen
_STEPS = 40
_UNITS = {"M": 1e6, "G": 1e9, "T": 1e12}
_ABSOLUTE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])\s*(?:MACs?|FLOPs)?", re.IGNORECASE)
_RELATIVE = re.compile(r"(\d*\.?\d+)\s*(x|%)", re.IGNORECASE)


def parse_budget(budget: str, dense: float) -> float:
    """Read "2.9 GMACs", "800M", "0.6x" or "60%" as multiply-adds.

    ``dense`` is what the model costs without a method. What papers call GFLOPs are GMACs, and both
    are understood as such.
    """
    text = budget.strip() if isinstance(budget, str) else ""
    if relative := _RELATIVE.fullmatch(text):
        share = float(relative[1]) / (100 if relative[2] == "%" else 1)
        target = share * dense
    elif absolute := _ABSOLUTE.fullmatch(text):
        target = float(absolute[1]) * _UNITS[absolute[2].upper()]
    else:
        raise ValueError(
            "budget must read like '2.9 GMACs', '800 MMACs', '0.6x' or '60%', or, as a time, like "
            f"'1.5x faster' or '12 ms', got {budget!r}"
        )
    if not 0 < target <= dense * (1 + _TOLERANCE):
        raise ValueError(
            f"budget {budget!r} is {target / 1e9:.4g} GMACs; it must be above 0 and at most what "
            f"the model without a method costs, {dense / 1e9:.4g} GMACs"
        )
    return target


def solve_budget(
    budget: str, backbone: Backbone, make: Callable[[Mapping[str, Any]], Reducer]
) -> Reducer:
    """Return the method at the rate at which an image of the model's own size costs the budget.

    Args:
        budget: as ``parse_budget`` reads it.
        backbone: parts of the model.
        make: builds the method from options that override the user's; called many times.
    """
    spec = backbone.spec
    target = parse_budget(budget, cost(spec, None, spec.grid).total)

    def price(reducer: Reducer) -> float:
        if reducer.fixed_count:
            return run_on_meta(spec, reducer, spec.grid).total
        return cost(spec, reducer, spec.grid).total

    cost_of = priced(backbone, make, price)
    return make(rate_for(target, backbone, make, cost_of, lambda macs: f"{macs / 1e9:.4g} GMACs"))


def priced(
    backbone: Backbone,
    make: Callable[[Mapping[str, Any]], Reducer],
    price: Callable[[Reducer], float],
) -> Callable[[Mapping[str, Any]], float]:
    """Return a function that gives the cost of a method with some options, worked out once.

    Args:
        backbone: parts of the model.
        make: builds the method from options that override the user's; called many times.
        price: gives the cost of a method, whose weights are on the meta device.
    """
    known: dict[str, float] = {}

    def cost_of(options: Mapping[str, Any]) -> float:
        key = repr(sorted(options.items()))
        if key not in known:
            reducer = make(options)
            with torch.device("meta"):  # only the sizes of a method's layers are needed
                reducer.build(backbone.spec)
            known[key] = price(reducer)
        return known[key]

    return cost_of


def rate_for(
    target: float,
    backbone: Backbone,
    make: Callable[[Mapping[str, Any]], Reducer],
    cost_of: Callable[[Mapping[str, Any]], float],
    said: Callable[[float], str],
    tolerance: float = _TOLERANCE,
) -> dict[str, Any]:
    """Return the option that sets a method's rate so that it costs the target.

    Args:
        target: what it should cost.
        backbone: parts of the model.
        make: builds the method from options that override the user's; called many times.
        cost_of: gives the cost of the method with some options, as ``priced`` makes it.
        said: puts a cost into words.
        tolerance: how far the cost may be from the target, as a share of it.
    """
    template = make({})
    template.build(backbone.spec)
    if not template.rate:
        raise ValueError(f"{template.name} has no rate that could be set to meet a budget")

    low, high = 0.0, 1.0  # a low level drops few tokens, so its price is high
    for step in range(_STEPS):
        dear, cheap = (cost_of(template.at_level(level)) for level in (low, high))
        # The price falls almost in a straight line; halving at every third step ensures an end.
        share = (dear - target) / max(dear - cheap, 1e-9 * dear) if step % 3 < 2 else 0.5
        middle = low + (high - low) * min(max(share, 0.01), 0.99)
        now = cost_of(template.at_level(middle))
        low, high = (middle, high) if now >= target else (low, middle)
        if abs(now - target) <= _GOOD * target:
            break
    nearest = [template.at_level(level) for level in (high, low)]
    best = min(nearest[::-1], key=lambda options: abs(cost_of(options) - target))
    if abs(cost_of(best) - target) > tolerance * target:
        least, most = (cost_of(template.at_level(level)) for level in (1.0, 0.0))
        around = " and ".join(said(cost_of(options)) for options in nearest)
        inside = f"; the costs nearest to the budget are {around}"
        raise ValueError(
            f"{template.name} cannot meet {said(target)} within {tolerance:.0%}: it reaches from "
            f"{said(least)} to {said(most)}" + (inside if least < target < most else "")
        )
    return _short(best, lambda options: abs(cost_of(options) - target) <= _GOOD * target)


def _short(options: dict[str, Any], good: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """Round a rate to as few digits as still meet the budget."""
    (name, value), *others = options.items()
    if others or not isinstance(value, float):
        return options
    for digits in range(1, 6):
        rounded = {name: round(value, digits)}
        if 0 < rounded[name] <= 1 and good(rounded):
            return rounded
    return options
