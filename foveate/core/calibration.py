"""Calibration: make the gates of a trained method keep their target shares by arg-max too.

The ratio loss controls the share that *sampled* gates keep. If almost all odds of a gate lie on one
side of even, it can sample the right share, but arg-max keeps all tokens or none. ``calibrate``
shifts each gate's odds so that, over some training images, arg-max keeps the share that the
schedule asks for. Counts still differ from image to image, and evaluation stays deterministic.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from foveate.core.driver import ReducedViT
from foveate.core.evaluation import evaluating
from foveate.core.gated import GatedReducer, log_odds
from foveate.core.reducer import Reducer
from foveate.core.tokens import TokenState

__all__ = ["can_calibrate", "calibrate"]

_log = logging.getLogger(__name__)


class _Reached(Exception):
    """Signals that the gate in question has answered, so the rest of the pass is not needed."""


def can_calibrate(reducer: Reducer) -> TypeGuard[GatedReducer]:
    """Tell whether a method has gates whose shift changes how many tokens an image keeps."""
    return isinstance(reducer, GatedReducer) and not reducer.fixed_count


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Any]) -> dict[int, float]:
    """Shift the gates of a model in place so that arg-max keeps the target shares on average.

    The gates are shifted one after another, because each sees what the earlier ones kept. The
    images run once for every gate, up to that gate.

    Args:
        model: a model from ``foveate.apply`` with a gated method, or a dense model around one.
        images: batches of training images in the form that the model takes, without targets.

    Returns:
        What was added to the log-odds of keeping, by block.
    """
    reducer = _gated(model)
    batches = list(images)
    if not batches:
        raise ValueError("calibrate needs at least one batch of images")
    given, shifts = reducer.gate, {}
    reducer.gate = "argmax"
    try:
        with evaluating(model):
            for stage, block in enumerate(reducer.active_blocks):
                shifts[block] = _calibrate_gate(model, reducer, stage, batches)
    finally:
        reducer.gate = given
    _log.info("gates of %s were shifted by block: %s", reducer.name, shifts)
    return shifts


def _gated(model: nn.Module) -> GatedReducer:
    found = [m for m in model.modules() if isinstance(m, ReducedViT)]
    if len(found) != 1:
        raise ValueError(f"calibrate needs a model with one reduced ViT inside, found {len(found)}")
    reducer = found[0].reducer
    if not isinstance(reducer, GatedReducer):
        raise ValueError(f"{reducer.name} has no gates to calibrate")
    if not can_calibrate(reducer):
        raise ValueError(
            f"{reducer.name} keeps a fixed number of tokens by gate='topk', which calibration does "
            "not change: set gate='argmax' first"
        )
    return reducer


def _calibrate_gate(
    model: nn.Module, reducer: GatedReducer, stage: int, batches: list[Any]
) -> float:
    odds: list[Tensor] = []
    wanted = 0.0
    ask = reducer.logits

    def listen(now: int, state: TokenState) -> Tensor:
        nonlocal wanted
        logits = ask(now, state)
        if now == stage:
            found, count = reducer.candidates(stage, state, log_odds(logits))
            odds.append(found)
            wanted += reducer.target(stage) * count
            raise _Reached
        return logits

    vars(reducer)["logits"] = listen  # hides the method of the class
    try:
        for batch in batches:
            try:
                model(batch)
            except _Reached:
                continue
            raise RuntimeError(f"the model never ran gate {stage} of {reducer.name}")
    finally:
        del vars(reducer)["logits"]
    shift = _shift(torch.cat(odds), round(wanted))
    reducer.shift(stage, shift)
    return shift


def _shift(odds: Tensor, keep: int) -> float:
    """Return the shift after which ``keep`` of the log-odds are positive."""
    ordered = odds.sort(descending=True).values
    if len(ordered) == 0:
        return 0.0
    keep = min(max(keep, 0), len(ordered))
    if keep == 0:
        return float(-ordered[0]) - 1.0
    if keep == len(ordered):
        return max(0.0, float(-ordered[-1]) + 1.0)
    return float(-(ordered[keep - 1] + ordered[keep]) / 2)
