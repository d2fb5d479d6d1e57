"""SViT: a gate before every block chooses the tokens it works on; the others wait unchanged.

Paper: Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation",
WACV 2024.

Scored: every token by a two-layer MLP, again before each block, so a token left out once may be
used later. Nothing is dropped: what a block skips keeps its value. Each image uses as many tokens
as its gates say.

Training: required for the gates. All tokens are computed; ``x = m * block(x) + (1 - m) * x`` with
the gates m also as a key mask, through which no gradient flows. The ratio loss (weight 4) holds
the batch mean of each gate to its target, or each image's (``ratio="fixed"``).

Ablations of the paper: ``ratio="fixed"``; ``reactivate=False, span=3``, whose three gates each
decide for three blocks; ``network="predictor"``, DynamicViT's network as the gate.

Deviations: prefix tokens are always active; the released checkpoints gate them in the last block
(``gate_prefix_last=True``). The release samples its gates in evaluation; here evaluation is
arg-max unless ``gate="sample"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.core import (
    AttentionReader,
    BackboneSpec,
    GatedReducer,
    Selection,
    TokenState,
    check_choice,
    linear_cost,
    shift_odds,
)
from foveate.methods.dynamicvit import Predictor
from foveate.registry import register

__all__ = ["Gate", "SViT"]

_USABLE, _GATE, _BEFORE, _ALIVE = "svit.usable", "svit.gate", "svit.before", "svit.alive"


class Gate(nn.Sequential):
    """Norm and a two-layer MLP with two outputs: keep and drop."""

    def __init__(self, width: int) -> None:
        out = nn.Linear(width // 4, 2)  # made first, so that a seed still gives the same gates
        super().__init__(nn.LayerNorm(width), nn.Linear(width, width // 4), nn.GELU(), out)

    def shift(self, amount: float) -> None:
        """Add a number to the log-odds of keeping."""
        shift_odds(self[-1], amount)


@register("svit")
@dataclass(eq=False, kw_only=True, repr=False)
class SViT(GatedReducer):
    """Per-block gates over all tokens, with skipped tokens preserved.

    Attributes:
        keep: share of the tokens that gates keep. One number means keep, keep**2 and keep**3 in the
            first, second and last third of the gated blocks; else give one for each gate.
        blocks: numbers of the blocks that have a gate, counted from 0. None means every block from
            a quarter of the depth on, or the first of each ``span`` of them.
        rest: what becomes of the others: "park" (they skip this block) is the only choice.
        reactivate: tokens left out may be used again; False keeps them out.
        span: number of blocks that one decision holds for.
        network: "mlp" decides by a token alone, "predictor" by the mean of all tokens too.
        ratio: "dynamic" holds the batch to the target, "fixed" holds each image to it.
        gate_prefix_last: the last gate decides about prefix tokens too.
        keep_bias: initial bias of the gates towards keeping; the release has none.
    """

    rounding: str = "nearest"
    rest: str = "park"
    reactivate: bool = True
    span: int = 1
    network: str = "mlp"
    ratio: str = "dynamic"
    gate_prefix_last: bool = False
    keep_bias: float = 0.0

    paper: ClassVar[str] = "Liu et al., SViT, WACV 2024"
    summary: ClassVar[str] = "gates choose the tokens of every block; the others wait unchanged"
    hooks: ClassVar[tuple[str, ...]] = ("before", "after")
    parks: ClassVar[bool] = True
    rule: ClassVar[str] = "argmax"
    lasting: ClassVar[bool] = False
    softmax_eps: ClassVar[float | None] = None
    default_loss_weights: ClassVar[Mapping[str, float]] = {"ratio": 4.0}

    def validate(self) -> None:
        """Check rate, gate and switches."""
        super().validate()
        check_choice("rest", self.rest, ("park",))
        check_choice("ratio", self.ratio, ("dynamic", "fixed"))
        check_choice("network", self.network, ("mlp", "predictor"))
        if self.span < 1:
            raise ValueError(f"span must be at least 1 block, got {self.span}")
        vars(self)["ratio_per_image"] = self.ratio == "fixed"

    def default_blocks(self, depth: int) -> tuple[int, ...]:
        """Gate every block from a quarter of the depth on, or the first of each span."""
        return tuple(range(depth // 4, depth, self.span))

    def rates(self, stages: int) -> float | tuple[float, ...]:
        """Let a single rate fall in thirds of the gated blocks."""
        if isinstance(self.keep, Sequence):
            return self.keep
        return tuple(self.keep ** (1 + 3 * stage // stages) for stage in range(stages))

    def build(self, spec: BackboneSpec) -> None:
        """Make one gate per gated block."""
        super().build(spec)
        following = (*self.active_blocks[1:], spec.depth)
        self._ends = tuple(
            min(block + self.span, after) - 1
            for block, after in zip(self.active_blocks, following, strict=True)
        )
        kind = Gate if self.network == "mlp" else Predictor
        self.gates = nn.ModuleList(kind(spec.width) for _ in self.active_blocks)
        if self.keep_bias:
            for stage in range(len(self.gates)):
                self.shift(stage, self.keep_bias)

    # Deciding: over the patches, and in the last block over the prefix too if asked ---------------

    def front(self, stage: int, state: TokenState) -> int:
        """Gate the prefix in the last block if asked to."""
        last = stage == len(self.active_blocks) - 1
        return 0 if self.gate_prefix_last and last else state.prefix

    def logits(self, stage: int, state: TokenState) -> Tensor:
        """Score every gated token with the gate of this stage."""
        gate = self.gates[stage]
        odds = gate(state) if isinstance(gate, Predictor) else gate(state.x)
        return state.layout.rect(odds)[:, self.front(stage, state) :]

    def shift(self, stage: int, amount: float) -> None:
        """Move the last bias of a gate."""
        gate = self.gates[stage]
        assert isinstance(gate, (Gate, Predictor))
        gate.shift(amount)

    def usable(self, stage: int, state: TokenState) -> Tensor | None:
        """Mark the tokens that no earlier gate left out; None if all may be used."""
        if _USABLE not in state.extras:
            return None
        return state.layout.rect(state.extras[_USABLE])[:, self.front(stage, state) :] > 0

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        """Score a token by its log-odds; those that may not be used score lowest."""
        score, usable = super().score(stage, state, attention), self.usable(stage, state)
        return score if usable is None else score.masked_fill(~usable, float("-inf"))

    def counts(self, stage: int, state: TokenState) -> int | list[int]:
        """Count the target share of all tokens that are gated."""
        assert state.layout.count is not None
        front = self.front(stage, state)
        return self._count(stage, state.layout.count - front, state.prefix - front)

    def gated_counts(self, stage: int, state: TokenState, now: list[int]) -> list[int]:
        """Count the target share of each image's tokens."""
        prefix = state.prefix - self.front(stage, state)
        present = self._present(stage, state)
        there = now if present is None else present.sum(1).tolist()
        return [self._count(stage, n, prefix) if n else 0 for n in there]

    def _count(self, stage: int, tokens: int, prefix: int) -> int:
        """Return how many of ``tokens``, ``prefix`` of them prefix tokens, "topk" keeps."""
        count = self.schedule.count(stage, tokens, tokens, self.progress)
        if not self.reactivate:  # no more than any earlier gate kept
            patches = tokens - prefix
            earlier = (self.schedule.count(s, patches, patches) for s in range(stage))
            count = min([count, *(n + prefix for n in earlier)])
        return count

    # What a closed gate does ---------------------------------------------------------------------

    def dispose(
        self,
        state: TokenState,
        kept: Selection,
        score: Tensor,
        attention: AttentionReader | None = None,
    ) -> TokenState:
        """Park what the block skips."""
        if not self.reactivate:
            spare = score.shape[1]
            open_ = score.new_zeros(len(score), spare + 1).scatter(1, kept.slots(spare), 1.0)
            state = self._bar(state, open_[:, :-1])
        return state.park(kept, with_prefix=score.shape[1] < state.layout.longest)

    def hide(self, stage: int, state: TokenState, keep: Tensor) -> TokenState:
        """Hide the keys of closed gates in training; all tokens are computed and mixed later."""
        if not self.reactivate:
            state = self._bar(state, keep)
        alive = state.alive
        assert alive is not None
        keep = torch.cat([keep.new_ones(len(keep), self.front(stage, state)), keep], 1)
        extras = {
            **state.extras,
            _GATE: state.layout.flat(keep).to(state.x.dtype),
            _BEFORE: state.x,
            _ALIVE: state.layout.flat(alive),
        }
        return state.replace(alive=keep.detach() * alive.detach(), extras=extras)

    def _bar(self, state: TokenState, open_: Tensor) -> TokenState:
        """Remember the gated tokens ``open_ [B, N]`` as the only ones that may be used again."""
        front = state.layout.longest - open_.shape[1]
        usable = torch.cat([open_.new_ones(len(open_), front), open_.detach()], 1)
        return state.replace(extras={**state.extras, _USABLE: state.layout.flat(usable)})

    def after(self, block: int, state: TokenState) -> TokenState:
        """Put processed and waiting tokens together again at the end of a span."""
        last = block in self._ends
        if _GATE not in state.extras:
            return state.recall() if last and state.parked is not None else state
        extras = dict(state.extras)
        gate = extras[_GATE][:, None]
        x = gate * state.x + (1 - gate) * extras[_BEFORE]
        if not last:  # the next block goes on with the same tokens
            return state.replace(x=x, extras={**extras, _BEFORE: x})
        del extras[_GATE], extras[_BEFORE]
        alive = state.layout.rect(extras.pop(_ALIVE))
        return state.replace(x=x, alive=alive, extras=extras)

    def parked_blocks(self) -> frozenset[int]:
        """Return the blocks of all spans, because tokens wait during them."""
        spans = zip(self.active_blocks, self._ends, strict=True)
        return frozenset(block for first, last in spans for block in range(first, last + 1))

    # Counts that depend on the image -------------------------------------------------------------

    def gate_macs(self, stage: int, tokens: int) -> int:
        """Count the gate on every token."""
        gate = self.gates[stage]
        return gate.macs(tokens) if isinstance(gate, Predictor) else tokens * linear_cost(gate)

    def expected_count(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Expect the target share inside a span, everything outside."""
        if hook == "before" and block in self.active_blocks:
            return self._count(self.active_blocks.index(block), grid[0] * grid[1], 0)
        return grid[0] * grid[1] if hook == "after" and block in self._ends else current
