"""Multiply-adds of a forward pass, from token counts alone: nothing is run.

A linear layer counts once per token, attention as its two products of N x N, what a method reads
off attention and computes itself as the products that do it; norms, activations, sorting and
gathering not at all. That is what the papers call FLOPs, and half of what torch's FlopCounterMode
counts on the real pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from foveate.core.backbone import BackboneSpec
from foveate.core.reducer import Reducer

if TYPE_CHECKING:
    from foveate.core.driver import Trace

__all__ = ["BlockPlan", "Cost", "cost", "linear_cost", "measured", "plan"]

_HOOKS = ("before", "between", "after")


@dataclass(frozen=True)
class BlockPlan:
    """Tokens of one image in one block, prefix included."""

    attended: int
    fed: int
    left: int


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image, by part; ``total`` is their sum.

    Attributes:
        embed: the patch embedding.
        blocks: every block's linear layers and attention.
        method: what the method adds to every block: reading attention, predictors, matching.
        head: pooling and head.
        tokens: tokens of every block.
    """

    embed: float
    blocks: tuple[float, ...]
    method: tuple[float, ...]
    head: float
    tokens: tuple[BlockPlan, ...]

    @property
    def total(self) -> float:
        """All of it."""
        return self.embed + sum(self.blocks) + sum(self.method) + self.head


def linear_cost(*modules: nn.Module | None) -> int:
    """Multiply-adds per token of all linear layers in some modules."""
    return sum(
        layer.in_features * layer.out_features
        for module in modules
        if module is not None
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    )


def plan(spec: BackboneSpec, reducer: Reducer | None, grid: tuple[int, int]) -> list[BlockPlan]:
    """Tokens of every block; expected or at most, where counts depend on the image."""
    current, blocks = grid[0] * grid[1], []
    for block in range(spec.depth):
        counts = []
        for hook in _HOOKS:
            if reducer is not None:
                current = reducer.planned(block, hook, current, grid)
            counts.append(current + spec.prefix)
        blocks.append(BlockPlan(*counts))
    return blocks


def measured(trace: Trace) -> list[list[BlockPlan]]:
    """Tokens of every block, for each image of a trace."""
    counts = [
        [s.layout.lengths for s in (b.attended, b.fed, b.left)] for b in trace.blocks
    ]  # [block][place][image]
    images = range(len(counts[0][0]))
    return [[BlockPlan(*(place[i] for place in block)) for block in counts] for i in images]


def cost(
    spec: BackboneSpec,
    reducer: Reducer | None,
    grid: tuple[int, int],
    tokens: Sequence[BlockPlan] | None = None,
) -> Cost:
    """Multiply-adds of one image.

    Args:
        spec: facts of the backbone.
        reducer: a method bound to it, or None for the dense model.
        grid: patch rows and columns.
        tokens: tokens of every block where they were measured; None takes the planned ones.
    """
    blocks = tuple(plan(spec, reducer, grid) if tokens is None else tokens)
    members = () if reducer is None else reducer.members
    patches, entering = grid[0] * grid[1], grid[0] * grid[1] + spec.prefix
    linear, method = [], []
    for block, now in enumerate(blocks):
        linear.append(
            now.attended * spec.qkv_cost[block]
            + 2 * now.attended**2 * spec.heads * spec.head_dim
            + now.fed * spec.mlp_cost[block]
        )
        own = 0
        for hook, before, after in zip(
            _HOOKS,
            (entering, now.attended, now.fed),
            (now.attended, now.fed, now.left),
            strict=True,
        ):
            own += _own(spec, members, block, hook, before, after, grid)
        method.append(own)
        entering = now.left
    final = entering - spec.prefix
    if reducer is not None and reducer.preserves:
        final = patches
    return Cost(
        embed=patches * spec.embed_cost,
        blocks=tuple(linear),
        method=tuple(method),
        head=spec.head_cost + final * spec.pool_cost,
        tokens=blocks,
    )


def _own(
    spec: BackboneSpec,
    members: Sequence[Reducer],
    block: int,
    hook: str,
    before: int,
    after: int,
    grid: tuple[int, int],
) -> int:
    """What the parts of a method compute themselves at one hook, one after another."""
    total, now = 0, before
    parts = members[::-1] if hook == "after" else members
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        left = after if last else part.planned(block, hook, now - spec.prefix, grid) + spec.prefix
        if hook == "between" and part.reads(block, now, left):
            # Read off the attention that was computed, whatever an earlier part has dropped.
            total += _reading(spec, part, before)
        total += part.macs(block, hook, now, left)
        now = left
    return total


def _reading(spec: BackboneSpec, part: Reducer, tokens: int) -> int:
    """Products behind what a method reads off attention."""
    width = spec.heads * spec.head_dim
    whole_map = tokens * tokens * width
    total = 0
    if "cls_row" in part.needs:
        # One row as a product with a block-diagonal query of all heads (core/attention.py).
        total += spec.heads * tokens * width if spec.class_token else whole_map
    if "key_mean" in part.needs and spec.thin_key_mean:
        total += tokens * spec.width * spec.head_dim
    if "attention" in part.needs:
        total += whole_map
    return total
