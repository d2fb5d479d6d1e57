"""Set untrained gates, whose decisions are arbitrary, so that they keep about their target share.

Only gates that let each image have its own count need it. The last layer of each is scaled so that
the log-odds of keeping have unit spread, and its bias is moved so that a calibration batch keeps
exactly the gate's target share. Other images then keep about that share, each its own count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import GatedReducer, ReducedViT, TokenState
from foveate.core.calibration import can_calibrate
from foveate.core.gated import log_odds
from foveate.dense import DenseBackbone

__all__ = ["calibrate"]

# The layer that computes a gate's log-odds, by method and stage.
_LAST: dict[str, Callable[[Any, int], nn.Module]] = {
    "dynamicvit": lambda reducer, stage: reducer.predictors[stage].out[-1],
    "spvit": lambda reducer, stage: reducer.selectors[stage].predictors.rest[-1],
    "svit": lambda reducer, stage: reducer.gates[stage][-1],
}


@torch.no_grad()
def calibrate(model: ReducedViT | DenseBackbone, images: Any) -> bool:
    """Set every gate in one pass, each on the tokens that the gates before it leave.

    Return whether there was any gate to set.
    """
    gated = [part for part in model.reducer.members if can_calibrate(part) and part.name in _LAST]
    for part in gated:
        vars(part)["before"] = _setting(part)
    try:
        if gated:
            model.run(images)
    finally:
        for part in gated:
            del vars(part)["before"]
    return bool(gated)


def _setting(reducer: GatedReducer) -> Callable[[int, TokenState], TokenState]:
    """Return the method's ``before`` that sets the gate of a block just before it decides."""
    decide = reducer.before

    def before(block: int, state: TokenState) -> TokenState:
        if block in reducer.active_blocks:
            stage = reducer.active_blocks.index(block)
            odds = _odds(reducer, stage, state)
            wanted = reducer.target(stage) * state.patches * state.batch
            _set(odds, wanted, _LAST[reducer.name](reducer, stage))
        return decide(block, state)

    return before


def _odds(reducer: GatedReducer, stage: int, state: TokenState) -> Tensor:
    """Return the log-odds of every token that the gate decides about, in one row."""
    odds = log_odds(reducer.logits(stage, state))
    counted, exempt = state.present(), reducer.exempt(state)
    if exempt is not None:
        counted = ~exempt if counted is None else counted & ~exempt
    return odds.flatten() if counted is None else odds[counted]


def _set(odds: Tensor, wanted: float, layer: Any) -> None:
    """Scale a layer so that log-odds have unit spread; move its bias so ``wanted`` are kept."""
    spread = float(odds.std().clamp_min(1e-6))
    dropped = min(max(round(odds.numel() - wanted), 0), odds.numel() - 1)
    threshold = float(odds.sort().values[dropped])
    layer.weight /= spread
    layer.bias[..., 0] = (layer.bias[..., 0] - threshold) / spread
    layer.bias[..., 1] /= spread
