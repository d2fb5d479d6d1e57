"""Captions: the method and its rate, the tokens of every block, and multiply-adds."""

from __future__ import annotations

from foveate.core import ReducedViT, Trace
from foveate.core.cost import BlockPlan, cost
from foveate.viz.steps import check_index, live_tokens

__all__ = ["caption", "giga", "image_cost"]


def caption(model: ReducedViT, trace: Trace, index: int = 0) -> list[str]:
    """Write lines for one image: the method, tokens in each block's MLP, and GMACs.

    Tokens and multiply-adds are those of this image, prefix tokens included. A masked pass
    computes all tokens, but only those that take part are counted.
    """
    now, dense = image_cost(model, trace, index)
    return [
        repr(model.reducer),
        f"tokens per block: {' '.join(str(block.fed) for block in _plan(trace, index))}",
        f"{giga(now, dense)} GMACs ({now / dense:.0%})",
    ]


def image_cost(model: ReducedViT, trace: Trace, index: int = 0) -> tuple[float, float]:
    """Return the multiply-adds of one image of a trace, with and without the method."""
    spec = model.backbone.spec
    now = cost(spec, model.reducer, trace.grid, _plan(trace, index))
    return now.total, cost(spec, None, trace.grid).total


def _plan(trace: Trace, index: int) -> list[BlockPlan]:
    """Count the working tokens of one image, block by block."""
    index = check_index(trace, index)
    return [
        BlockPlan(*(int(live_tokens(s, index).sum()) for s in (b.attended, b.fed, b.left)))
        for b in trace.blocks
    ]


def giga(value: float, dense: float) -> str:
    """Write both numbers in billions, with as many digits as the smaller one needs."""
    digits = 2 if min(value, dense) >= 1e8 else 4
    return f"{value / 1e9:.{digits}f} of {dense / 1e9:.{digits}f}"
