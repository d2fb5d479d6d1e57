"""Captions: the method and its rate, the tokens of every block, and multiply-adds."""

from __future__ import annotations

from foveate.core import ReducedViT, Trace
from foveate.core.cost import BlockTokens, cost, has_formula
from foveate.facts import count
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
        f"tokens per block: {' '.join(str(block.mlp) for block in _plan(trace, index))}",
        f"{giga(now, dense)} GMACs ({now / dense:.0%})",
    ]


def image_cost(model: ReducedViT, trace: Trace, index: int = 0) -> tuple[float, float]:
    """Return the multiply-adds of one image of a trace, with and without the method."""
    spec, reducer = model.backbone.spec, model.reducer
    if reducer.fixed_count:  # the same for every image
        size = tuple(n * side for n, side in zip(trace.grid, spec.patch, strict=True))
        counted = count(model, (size[0], size[1]))
        return counted.macs, counted.dense_macs
    # Without a formula for the method's own products, they are left out.
    own = has_formula(reducer)
    now = cost(spec, reducer, trace.grid, _plan(trace, index), own=own)
    return now.total, cost(spec, None, trace.grid).total


def _plan(trace: Trace, index: int) -> list[BlockTokens]:
    """Count the working tokens of one image, block by block."""
    index = check_index(trace, index)
    return [
        BlockTokens(*(int(live_tokens(s, index).sum()) for s in (b.attention, b.mlp, b.output)))
        for b in trace.blocks
    ]


def giga(value: float, dense: float) -> str:
    """Write both numbers in billions, with as many digits as the smaller one needs."""
    digits = 2 if min(value, dense) >= 1e8 else 4
    return f"{value / 1e9:.{digits}f} of {dense / 1e9:.{digits}f}"
