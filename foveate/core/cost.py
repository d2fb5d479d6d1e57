"""Multiply-adds of a forward pass.

A linear layer counts once per token, attention counts as its two products of N x N, and a method's
own products count in full. Norms, activations, sorting and gathering do not count. The papers call
this number FLOPs; torch's FlopCounterMode counts two FLOPs for each multiply-add.

The facts of the backbone give the model's cost at given token counts. A method with the same count
for every image is run to find its own cost and its token counts. It runs on the meta device, where
nothing is computed and torch's counter sees every product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.attention import Heads
from foveate.core.backbone import Backbone, BackboneSpec, Embedded
from foveate.core.driver import ReducedViT
from foveate.core.reducer import Reducer
from foveate.core.tokens import TokenState
from foveate.core.trace import Trace

__all__ = [
    "BlockTokens",
    "Cost",
    "cost",
    "counting",
    "expected",
    "has_formula",
    "linear_cost",
    "measured",
    "on_meta",
    "run",
    "run_on_meta",
    "tokens_of",
]

_HOOKS = ("before", "between", "after")


@dataclass(frozen=True)
class BlockTokens:
    """Tokens of one image in one block, prefix included; see ``BlockTrace``."""

    attention: int
    mlp: int
    output: int


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image and the tokens of every block."""

    total: float
    tokens: tuple[BlockTokens, ...]


def linear_cost(*modules: nn.Module | None) -> int:
    """Count the multiply-adds per token of all linear layers in some modules."""
    return sum(
        layer.in_features * layer.out_features
        for module in modules
        if module is not None
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    )


# By running --------------------------------------------------------------------------------------


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module onto the meta device, in evaluation mode, without touching its weights."""
    # The memo names a stand-in for each tensor, so ``deepcopy`` copies none of them.
    memo: dict[int, object] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo).eval()


def run_on_meta(spec: BackboneSpec, reducer: Reducer, grid: tuple[int, int]) -> Cost:
    """Count a method with fixed counts, built on the meta device, without any model.

    The method runs between blocks that compute nothing. torch counts the method's own products, and
    the cost of the model follows from the token counts.
    """
    model = _Hollow(_Shell(spec, grid), reducer).eval()
    like = next(reducer.parameters(), None)
    dtype = torch.float32 if like is None else like.dtype
    found = run(model, torch.empty(1, 1, *grid, device="meta", dtype=dtype))
    rest = cost(spec, reducer, grid, found.tokens, own=False)
    return Cost(rest.total + found.total, found.tokens)


def tokens_of(spec: BackboneSpec, reducer: Reducer) -> tuple[BlockTokens, ...]:
    """Return the tokens of every block of a method with fixed counts, for the model's own size.

    The method runs on the CPU and its products are not counted, so this takes a tenth of the time
    of ``run_on_meta``.
    """
    model, watched = _Hollow(_Shell(spec, spec.grid), reducer).eval(), []
    with torch.inference_mode():
        state = model.begin(torch.zeros(1, 1, *spec.grid))
        for block in range(spec.depth):
            seen: dict[str, int] = {}
            state = model.step(block, state, _noting(seen))
            watched.append(BlockTokens(**seen))
    return tuple(watched)


def _noting(seen: dict[str, int]) -> Callable[[str, TokenState], None]:
    """Return a watcher that stores the number of tokens under the name of the place."""
    return lambda name, now: seen.__setitem__(name, now.layout.longest)


class _Shell(Backbone):
    """A backbone that has the facts of a model but parts that compute nothing."""

    def __init__(self, spec: BackboneSpec, grid: tuple[int, int]) -> None:
        super().__init__(nn.Module(), spec)
        self._grid, self._block = grid, nn.Identity()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self._block] * self.spec.depth

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        return self._grid

    def embed(self, images: Tensor) -> Embedded:
        count = self.spec.prefix + self._grid[0] * self._grid[1]
        return Embedded(images.new_empty(len(images), count, self.spec.width), self._grid)

    def attention_of(self, block: int) -> nn.Module:
        return self._block

    def attention_input(self, block: int, x: Tensor) -> Tensor:
        return x

    def qkv(self, block: int, y: Tensor, rotary: Tensor | None) -> Heads:
        each = y.new_empty(len(y), self.spec.heads, self.spec.head_dim)
        return Heads(each, each, each, 1.0)

    def project(self, block: int, out: Tensor, y: Tensor) -> Tensor:
        return y

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        return x

    def drop_path(self, block: int, branch: int) -> nn.Module | None:
        return None

    def norm(self, x: Tensor) -> Tensor:
        return x

    def head(self, state: TokenState) -> Tensor:
        return state.x


class _Hollow(ReducedViT):
    """Drives a shell; its attention computes nothing."""

    def attend(self, block: int, heads: Heads, state: TokenState) -> Tensor:
        return heads.v


@contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Count multiply-adds with torch's counter; yield a function that returns the count so far.

    Args:
        model: the module that is counted; its parameters take no gradient meanwhile.
    """
    # The counter asks views of trainable parameters for a gradient that they do not have.
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        # As two products, attention is counted by every version of torch on every device.
        flops, products = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), flops, products:
            yield lambda: flops.get_total_flops() / 2
    finally:
        for p in trained:
            p.requires_grad_(True)


def run(model: ReducedViT, images: Tensor) -> Cost:
    """Count one pass over one image with torch's counter."""
    watched: list[BlockTokens] = []
    with counting(model) as spent:
        state = model.begin(images)
        for block in range(model.backbone.spec.depth):
            seen: dict[str, int] = {}
            state = model.step(block, state, _noting(seen))
            watched.append(BlockTokens(**seen))
        model.backbone.head(model.end(state))
        total = spent()
    return Cost(total, tuple(watched))


def has_formula(reducer: Reducer) -> bool:
    """Tell whether counts differ by image and the method computes its own cost from them."""
    return not reducer.fixed_count and all(
        type(part).own_macs is not Reducer.own_macs for part in reducer.members
    )


# By formula --------------------------------------------------------------------------------------


def expected(
    spec: BackboneSpec, reducer: Reducer | None, grid: tuple[int, int]
) -> list[BlockTokens]:
    """Return the expected tokens of every block: the method's target counts, or upper bounds."""
    current, blocks = grid[0] * grid[1], []
    for block in range(spec.depth):
        counts = []
        for hook in _HOOKS:
            if reducer is not None:
                if hook == "before" and block in reducer.recall_blocks:
                    current = grid[0] * grid[1]
                current = reducer.expected_count(block, hook, current, grid)
            counts.append(current + spec.prefix)
        blocks.append(BlockTokens(*counts))
    return blocks


def measured(trace: Trace) -> list[list[BlockTokens]]:
    """Return the tokens of every block of a trace, for each of its images."""
    counts = [
        [s.layout.lengths for s in (b.attention, b.mlp, b.output)] for b in trace.blocks
    ]  # [block][place][image]
    images = range(len(counts[0][0]))
    return [[BlockTokens(*(place[i] for place in block)) for block in counts] for i in images]


def cost(
    spec: BackboneSpec,
    reducer: Reducer | None,
    grid: tuple[int, int],
    tokens: Sequence[BlockTokens] | None = None,
    *,
    own: bool = True,
) -> Cost:
    """Work out the multiply-adds of one image.

    Args:
        spec: facts of the backbone.
        reducer: a method built for it; None for the dense model.
        grid: patch rows and columns.
        tokens: tokens of every block; None takes the expected ones.
        own: count the method's own products too, which takes a method with ``own_macs``.
    """
    blocks = tuple(expected(spec, reducer, grid) if tokens is None else tokens)
    patches = grid[0] * grid[1]
    total = spec.embed_image_cost + patches * spec.embed_cost + patches**2 * spec.embed_pair_cost
    total, entering = total + spec.head_cost, patches + spec.prefix
    for block, now in enumerate(blocks):
        total += now.attention * spec.qkv_cost[block]
        total += 2 * now.attention**2 * spec.heads * spec.head_dim
        total += now.mlp * spec.mlp_cost[block]
        if reducer is not None:
            if block in reducer.recall_blocks:
                entering = patches + spec.prefix
            for hook, count in zip(_HOOKS, (entering, now.attention, now.mlp), strict=True):
                total += reducer.own_macs(block, hook, count) if own else 0
        entering = now.output
    if reducer is not None and spec.depth in reducer.recall_blocks:
        entering = patches + spec.prefix
    return Cost(total + (entering - spec.prefix) * spec.pool_cost, blocks)
