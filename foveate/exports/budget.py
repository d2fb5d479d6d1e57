"""Set a method's rate so that the exported model meets a time: export, time, correct, repeat."""

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
    """Read the budget of an export; raise ValueError for one that no runtime can meet.

    Args:
        text: such as "1.5x faster" or "12 ms, batch 8".
        model: model that will be exported.
        batch: fixed number of images in a call, or None.
    """
    if not is_time(text):
        raise ValueError(
            f"the budget of an export is a time such as '1.5x faster' or '12 ms', got {text!r}; "
            "foveate.apply takes budgets of multiply-adds"
        )
    wanted = TimeBudget.parse(text)
    if wanted.dtype is not None:
        raise ValueError(
            f"an exported model computes in float32, or in 8 bits with int8: leave {wanted.dtype} "
            f"out of the budget {text!r}"
        )
    if batch is not None and wanted.batch not in (1, batch):
        raise ValueError(
            f"the budget {text!r} is for a batch of {wanted.batch}, and the fixed batch is {batch}"
        )
    reduced = reduced_of(model)
    if reduced is None or reduced.reducer.name == "dense":
        raise ValueError("a budget sets the rate of a method, and this model has none")
    if isinstance(reduced.reducer, Chain):
        raise ValueError("a budget sets the rate of one method; give the rates of a chain yourself")
    return wanted


def at_time(
    wanted: TimeBudget, model: nn.Module, where: str, exported: Callable[[nn.Module], Call]
) -> nn.Module:
    """Return the model with the rate at which its exported form meets a time; weights are shared.

    Args:
        wanted: time that a call may take.
        model: model with a method that keeps the same number of tokens in all images.
        where: the setting that is timed, for messages.
        exported: function that exports a model and returns a function that runs it once.
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
    """Return the median milliseconds of each call, timed in one run."""
    # Each session of a runtime has threads of its own, which turn idly for a while after a call and
    # hold up the next one, as they never do where the model runs alone.
    with torch.inference_mode():
        timings = time_calls(calls, "cpu", settle=True)
    return {name: timings.ms(name).median for name in calls}
