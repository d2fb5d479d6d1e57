"""Multiply-adds of a forward pass, from token counts alone: nothing is run."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.core.backbone import BackboneSpec
from foveate.core.reducer import Reducer

__all__ = ["BlockPlan", "plan", "total_macs"]


@dataclass(frozen=True)
class BlockPlan:
    """Tokens of one image in one block, prefix included."""

    attended: int
    fed: int
    left: int


def plan(spec: BackboneSpec, reducer: Reducer | None, grid: tuple[int, int]) -> list[BlockPlan]:
    """Tokens of every block; expected or at most, where counts depend on the image."""
    current, blocks = grid[0] * grid[1], []
    for block in range(spec.depth):
        counts = []
        for hook in ("before", "between", "after"):
            if reducer is not None:
                current = reducer.planned(block, hook, current, grid)
            counts.append(current + spec.prefix)
        blocks.append(BlockPlan(*counts))
    return blocks


def total_macs(spec: BackboneSpec, reducer: Reducer | None, grid: tuple[int, int]) -> int:
    """Multiply-adds of one image, the method's own scoring left out.

    Linear layers count once per token, attention as two products of N x N, norms and activations
    not at all: what the papers call FLOPs.
    """
    total = grid[0] * grid[1] * spec.embed_cost + spec.head_cost
    for block, tokens in enumerate(plan(spec, reducer, grid)):
        total += tokens.attended * spec.qkv_cost[block]
        total += 2 * tokens.attended**2 * spec.heads * spec.head_dim
        total += tokens.fed * spec.mlp_cost[block]
    return total
