"""SViT: a gate before every block chooses the tokens it works on; the others wait unchanged.

Paper: Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation",
WACV 2024.

Scored: every token by a two-layer MLP, anew before each block, so a token left out once may be
used again. Nothing is dropped: what a block skips keeps its value. Each image uses as many tokens
as its gates say.

Training: required for the gates. All tokens are computed; ``x = m * block(x) + (1 - m) * x`` with
the gates m also as a key mask, through which no gradient flows. The ratio loss (weight 4) holds
the batch mean of each gate to its target, or each image's (``ratio="fixed"``).

Deviations: prefix tokens are always active; the released checkpoints gate them in the last block
(``gate_prefix_last=True``). The release samples its gates in evaluation; here evaluation is
arg-max unless ``gate="sample"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core import (
    BackboneSpec,
    Reducer,
    TokenState,
    check_blocks,
    check_choice,
    check_keep,
    decide,
    linear_cost,
)
from foveate.core.gates import DECISIONS, ratio_loss
from foveate.registry import register

__all__ = ["Gate", "SViT"]

_USED = "svit.used"


class Gate(nn.Sequential):
    """Norm and a two-layer MLP with two outputs: keep and drop."""

    def __init__(self, width: int, keep_bias: float) -> None:
        out = nn.Linear(width // 4, 2)
        if keep_bias:
            with torch.no_grad():
                out.bias.copy_(torch.tensor([keep_bias / 2, -keep_bias / 2]))
        super().__init__(nn.LayerNorm(width), nn.Linear(width, width // 4), nn.GELU(), out)


@register("svit")
@dataclass(eq=False, kw_only=True, repr=False)
class SViT(Reducer):
    """Per-block gates over all tokens, with skipped tokens preserved.

    Attributes:
        keep: target share of tokens: one rate means keep, keep**2 and keep**3 in the first,
            second and last third of the gated blocks; or one rate for each.
        blocks: where; None is every block from a quarter of the depth on.
        reactivate: tokens left out may be used again; False keeps them out.
        ratio: "dynamic" holds the batch to the target, "fixed" each image.
        gate: "sample", "argmax", "topk"; None samples while training masked, else takes arg-max.
        gate_prefix_last: the last gate decides about prefix tokens too.
        keep_bias: initial bias of the gates towards keeping; the release has none.
    """

    keep: float | tuple[float, ...] = 0.7
    blocks: tuple[int, ...] | None = None
    reactivate: bool = True
    ratio: str = "dynamic"
    gate: str | None = None
    gate_prefix_last: bool = False
    keep_bias: float = 0.0

    paper: ClassVar[str] = "Liu et al., SViT, WACV 2024"
    summary: ClassVar[str] = "gates choose the tokens of every block; the others wait unchanged"
    hooks: ClassVar[tuple[str, ...]] = ("before", "after")
    training_need: ClassVar[str] = "required"
    gated: ClassVar[bool] = True
    maskable: ClassVar[bool] = True
    parks: ClassVar[bool] = True
    rate: ClassVar[str] = "keep"
    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0, "gate": "topk"}
    loss_weights: ClassVar[Mapping[str, float]] = {"ratio": 4.0}

    def validate(self) -> None:
        """Check rates and switches."""
        if self.blocks is not None:
            check_blocks(self.blocks)
        check_keep(self.keep)
        check_choice("ratio", self.ratio, ("dynamic", "fixed"))
        check_choice("gate", self.gate, (None, *DECISIONS))

    @property
    def fixed_count(self) -> bool:
        """Counts differ by image unless exactly k tokens are taken."""
        return self.gate == "topk"

    def build(self, spec: BackboneSpec) -> None:
        """Make one gate a block."""
        super().build(spec)
        blocks = tuple(range(spec.depth // 4, spec.depth)) if self.blocks is None else self.blocks
        self.acts = check_blocks(blocks, spec.depth)
        if isinstance(self.keep, Sequence) and len(self.keep) != len(self.acts):
            raise ValueError(f"keep has {len(self.keep)} rates for {len(self.acts)} blocks")
        self.gates = nn.ModuleList(Gate(spec.width, self.keep_bias) for _ in self.acts)

    def spans(self) -> frozenset[int]:
        """Tokens wait during each gated block."""
        return frozenset(self.acts)

    def target(self, stage: int) -> float:
        """Share of tokens that a gate should keep."""
        if isinstance(self.keep, Sequence):
            return self.keep[stage]
        return float(self.keep ** (1 + 3 * stage // len(self.acts)))

    def before(self, block: int, state: TokenState) -> TokenState:
        """Decide, and park what the block skips (or mask it while training)."""
        if block not in self.acts:
            return state
        stage = self.acts.index(block)
        masked = state.alive is not None
        how = self.gate
        if how is None:
            how = "sample" if masked and state.notes["training"] else "argmax"
        front = 0 if self.gate_prefix_last and block == self.acts[-1] else state.prefix
        logits = state.layout.rect(self.gates[stage](state.x))[:, front:]  # [B, N, 2]
        if how == "topk" and not masked and state.layout.is_even:
            return self._gathered(stage, state, logits, front)
        there = self._there(state, front)
        live = self._live(state, front, there)
        counts = self._counts(stage, state, front, there) if how == "topk" else None
        keep = decide(logits, how, k=counts, candidates=live)
        state = self._note(stage, state, keep, there)
        always = keep.new_ones(keep.shape[0], front)
        keep = torch.cat([always, keep], 1)  # [B, longest]
        if not self.reactivate:
            used = state.layout.flat(keep.detach())
            state = state.replace(extras={**state.extras, _USED: used})
        return self._mask(state, keep) if masked else state.park_but(keep > 0)

    def _gathered(self, stage: int, state: TokenState, logits: Tensor, front: int) -> TokenState:
        """Exactly k tokens at a static size: the deployed form of "topk"."""
        score = (logits[..., 0] - logits[..., 1]).float()
        if _USED in state.extras:
            used = state.layout.rect(state.extras[_USED])[:, front:]
            score = score.masked_fill(used <= 0, float("-inf"))
        k = self._wanted(stage, state.counts[0], state.prefix - front)
        idx = score.topk(k, dim=1).indices
        if not self.reactivate:
            now = torch.zeros_like(score).scatter(1, idx, 1.0)
            used = torch.cat([now.new_ones(now.shape[0], front), now], 1)
            state = state.replace(extras={**state.extras, _USED: state.layout.flat(used)})
        return state.park(idx, with_prefix=front > 0)

    @staticmethod
    def _there(state: TokenState, front: int) -> Tensor | None:
        """Tokens that take part at all, ``[B, N]``; None means all."""
        there = state.layout.valid(state.x.device)
        if state.alive is not None:
            alive = state.alive.detach() > 0
            there = alive if there is None else there & alive
        return None if there is None else there[:, front:]

    def _live(self, state: TokenState, front: int, there: Tensor | None) -> Tensor | None:
        """Tokens a gate may keep: those that are there, less those left out for good."""
        if _USED not in state.extras:
            return there
        used = state.layout.rect(state.extras[_USED])[:, front:] > 0
        return used if there is None else there & used

    def _counts(self, stage: int, state: TokenState, front: int, there: Tensor | None) -> list[int]:
        """How many tokens of each image "topk" keeps."""
        now = list(state.layout.lengths)
        now = [n - front for n in now] if there is None else there.sum(1).tolist()
        gated = state.prefix - front
        return [self._wanted(stage, n - gated, gated) if n else 0 for n in now]

    def _wanted(self, stage: int, patches: int, prefix: int = 0) -> int:
        """Tokens that "topk" keeps of so many patches and gated prefix tokens."""
        k = max(1, round(self.target(stage) * (patches + prefix)))
        if not self.reactivate:  # no more than every earlier gate left
            earlier = [max(1, round(self.target(s) * patches)) for s in range(stage)]
            k = min([k, *(n + prefix for n in earlier)])
        return min(k, patches + prefix)

    def _mask(self, state: TokenState, keep: Tensor) -> TokenState:
        """Training: all tokens are computed; the rest of the work is done after the block."""
        assert state.alive is not None
        visible = (keep.detach() * state.alive.detach()) > 0
        extras = {
            **state.extras,
            "svit.gate": state.layout.flat(keep).to(state.x.dtype),
            "svit.x": state.x,
            "svit.alive": state.layout.flat(state.alive),
        }
        return state.replace(visible=visible, alive=None, extras=extras)

    def after(self, block: int, state: TokenState) -> TokenState:
        """Put processed and waiting tokens together again."""
        if block not in self.acts:
            return state
        if state.outer is not None:
            return state.recall()
        extras = dict(state.extras)
        gate, before = extras.pop("svit.gate")[:, None], extras.pop("svit.x")
        alive = state.layout.rect(extras.pop("svit.alive"))
        x = gate * state.x + (1 - gate) * before
        return state.replace(x=x, visible=None, alive=alive, extras=extras)

    def _note(
        self, stage: int, state: TokenState, keep: Tensor, there: Tensor | None
    ) -> TokenState:
        """Record which share of an image's tokens the gate kept, for the ratio loss."""
        if there is None:
            share = keep.mean(1)
        else:
            share = (keep * there).sum(1) / there.sum(1).clamp_min(1)
        shares = {**self.noted(state.notes, "kept_share", {}), stage: share}
        return self.note(state, "kept_share", shares)

    def losses(self, notes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Distance of the used shares from the gates' targets."""
        shares = self.noted(notes, "kept_share", {})
        return ratio_loss(shares, self.target, per_image=self.ratio == "fixed")

    def macs(self, block: int, hook: str, tokens: int, left: int) -> int:
        """The gate, on every token."""
        if hook != "before" or block not in self.acts:
            return 0
        return tokens * linear_cost(self.gates[self.acts.index(block)])

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """The target share inside a gated block, everything outside."""
        if block not in self.acts or hook == "between":
            return current
        patches = grid[0] * grid[1]
        if hook == "after":
            return patches
        return self._wanted(self.acts.index(block), patches)
