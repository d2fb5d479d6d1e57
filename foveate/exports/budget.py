"""Time as a budget of an exported model: export, time, correct the rate, and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from foveate.api import apply, unwrap
from foveate.core import Chain
from foveate.core.cost import cost, run_on_meta
from foveate.exports.graph import reduced_of
from foveate.latency import TimeBudget, approach, is_time, time_calls
from foveate.registry import make, remake
from foveate.timing import DENSE

__all__ = ["at_time", "read_budget"]

Call = Callable[[], Any]


def read_budget(text: str, model: nn.Module, batch: int | None) -> TimeBudget:
    """Read the budget of an export, and refuse what cannot be met in a runtime.

    Args:
        text: such as "1.5x faster" or "12 ms, batch 8".
        model: what will be exported.
        batch: its fixed number of images, or None.
    """
    if not is_time(text):
        raise ValueError(
            f"the budget of an export is a time such as '1.5x faster' or '12 ms', got {text!r}; "
            "one of multiply-adds is for foveate.apply"
        )
    wanted = TimeBudget.parse(text)
    if wanted.dtype is not None:
        raise ValueError(
            f"an exported model computes in float32, or in 8 bits with int8: leave {wanted.dtype} "
            f"out of the budget {text!r}"
        )
    if batch is not None and wanted.batch not in (1, batch):
        raise ValueError(f"the budget {text!r} is not of the fixed batch of {batch}")
    reduced = reduced_of(model)
    if reduced is None or reduced.reducer.name == "dense":
        raise ValueError("a budget sets the rate of a method, and this model has none")
    if isinstance(reduced.reducer, Chain):
        raise ValueError("a budget sets the rate of one method; give the rates of a chain yourself")
    return wanted


def at_time(
    wanted: TimeBudget, model: nn.Module, where: str, exported: Callable[[nn.Module], Call]
) -> nn.Module:
    """Return the model at the rate at which its exported form meets a time; weights are shared.

    Args:
        wanted: the time of a call.
        model: with a method that keeps the same number of tokens in all images.
        where: what the time is of, in words.
        exported: exports a model and returns what runs it once.
    """
    plain, reduced = unwrap(model), reduced_of(model)
    assert reduced is not None
    reducer, spec = reduced.reducer, reduced.backbone.spec
    dense = exported(plain)
    whole, macs = _timed({DENSE: dense})[DENSE], cost(spec, None, spec.grid).total
    if not wanted.relative and whole <= wanted.value:
        raise wanted.needless(whole, where)

    def with_options(options: Mapping[str, Any]) -> nn.Module:
        found: nn.Module = apply(plain, remake(reducer, options), check=False)
        return found.train(model.training)

    def timed(options: Mapping[str, Any]) -> tuple[float, float]:
        found = _timed({"method": exported(with_options(options)), DENSE: dense})
        return found["method"], found[DENSE]

    options = approach(
        wanted,
        where,
        whole,
        reduced.backbone,
        lambda options: make(reducer.name, {**reducer.config(), **options}),
        lambda one: whole * run_on_meta(spec, one, spec.grid).total / macs,
        timed,
    )
    return with_options(options)


def _timed(calls: Mapping[str, Call]) -> dict[str, float]:
    """Return the milliseconds of some calls, timed together."""
    with torch.inference_mode():
        timings = time_calls(calls, "cpu")
    return {name: timings.ms(name).median for name in calls}
