"""Write captions: the method and its rate, the tokens of every block, and multiply-adds."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from foveate.core import ReducedViT, Trace
from foveate.core.cost import BlockTokens, cost, has_formula
from foveate.dense import Hosting
from foveate.facts import count
from foveate.viz.grid import check_index
from foveate.viz.steps import live_tokens

__all__ = ["Model", "caption", "giga", "image_cost"]


Model: TypeAlias = ReducedViT | Hosting


def caption(model: Model, trace: Trace, index: int = 0) -> list[str]:
    """Write lines for one image: the method, tokens in each block's MLP, and GMACs.

    Tokens and multiply-adds are those of this image, prefix tokens included. A masked pass
    computes all tokens, but only those that take part are counted.
    """
    now, dense = image_cost(model, trace, index)
    inside = " in the ViT" if isinstance(model, Hosting) else ""
    return [
        repr(model.reducer),
        f"tokens per block: {' '.join(str(block.mlp) for block in _plan(trace, index))}",
        f"{giga(now, dense)} GMACs ({now / dense:.0%}){inside}",
    ]


def image_cost(model: Model, trace: Trace, index: int = 0) -> tuple[float, float]:
    """Return the multiply-adds of one image of a trace, with and without the method.

    For a dense model, only those of the ViT inside are counted.
    """
    dense = isinstance(model, Hosting)
    reduced = model.reduced if isinstance(model, Hosting) else model
    spec, reducer = reduced.backbone.spec, reduced.reducer
    grid = trace.grids[check_index(trace, index)]
    if reducer.fixed_count and not dense:  # the same for every image
        counted = count(model, (grid[0] * spec.patch[0], grid[1] * spec.patch[1]))
        return counted.macs, counted.dense_macs
    if dense:
        prefix = trace.blocks[0].attention.prefix
        spec = replace(spec, prefix=prefix, head_cost=0, pool_cost=0)
    # The method's own products are counted only if there is a formula for them.
    own = has_formula(reducer)
    now = cost(spec, reducer, grid, _plan(trace, index), own=own)
    return now.total, cost(spec, None, grid).total


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
