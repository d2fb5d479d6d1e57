"""Evo-ViT: attended patches go through the blocks, the others follow along cheaply.

Paper: Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", AAAI 2022.

Scored: a running mean of the class token's attention, updated only for patches that were
processed. At the start of each stage the best half is processed with a representative token, the
score-weighted mean of the others; what the blocks add to the representative is added to each of
the others at the stage's end, where all patches come together again.

Training: required for the paper's accuracy (from scratch, with selection in every block at first
and in stages later: ``layerwise``). The paper classifies from the mean of all patches, which is
the ``global_pool="avg"`` of timm, with an auxiliary head on the class token (``aux=True``).

The DeiT models that its authors released have no representative and no fast update: patches that
are not selected simply skip the stage (``variant="deit"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core import (
    BackboneSpec,
    Reducer,
    Schedule,
    Seen,
    TokenState,
    check_blocks,
    check_choice,
    check_keep,
    linear_cost,
)
from foveate.core.tokens import zero_at
from foveate.ops import top_k
from foveate.registry import register

__all__ = ["EvoViT"]

_SCORE = "evovit.score"


@register("evovit")
@dataclass(eq=False, kw_only=True, repr=False)
class EvoViT(Reducer):
    """Slow and fast token evolution.

    Attributes:
        keep: share of all patches that a stage processes.
        starts: first block of each stage; a stage lasts until the next. None is a third and two
            thirds of the depth.
        layerwise: select anew in every block from the first start on; a number is the share of
            training, from its beginning, during which this holds (the paper's: 2 / 3).
        tradeoff: weight of the newest attention in the running score from the first stage on.
        variant: "paper", or "deit" for the released DeiT models.
        aux: train an auxiliary classifier on the class token; its logits are noted.
    """

    keep: float = 0.5
    starts: tuple[int, ...] | None = None
    layerwise: bool | float = False
    tradeoff: float = 0.5
    variant: str = "paper"
    aux: bool = False

    paper: ClassVar[str] = "Xu et al., Evo-ViT, AAAI 2022"
    summary: ClassVar[str] = "attended patches are processed, the others follow one representative"
    hooks: ClassVar[tuple[str, ...]] = ("before", "between", "after")
    needs: ClassVar[frozenset[str]] = frozenset({"cls_row"})
    training_need: ClassVar[str] = "required"
    parks: ClassVar[bool] = True
    rate: ClassVar[str] = "keep"
    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0}
    loss_weights: ClassVar[Mapping[str, float]] = {"class": 0.5, "aux": 0.5}

    def validate(self) -> None:
        """Check rate, weight and variant."""
        if self.starts is not None:
            check_blocks(self.starts)
        check_keep(self.keep)
        check_choice("variant", self.variant, ("paper", "deit"))
        if not 0 <= self.layerwise <= 1:
            raise ValueError(f"layerwise must lie in [0, 1], got {self.layerwise!r}")
        if not 0 < self.tradeoff <= 1:
            raise ValueError(f"tradeoff must lie in (0, 1], got {self.tradeoff!r}")

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the stages."""
        super().build(spec)
        starts = self.starts
        if starts is None:
            starts = tuple(sorted({max(1, spec.depth // 3), max(1, 2 * spec.depth // 3)}))
        starts = check_blocks(starts, spec.depth)
        if starts[0] == 0:
            raise ValueError("starts must lie after block 0, whose attention is the first score")
        self._starts = starts
        self.advance(self.progress)
        if self.aux:
            if not spec.classes or not spec.class_token:
                raise ValueError("aux=True needs a class token and a classification head")
            self.aux_norm = nn.LayerNorm(spec.width)
            self.aux_head = nn.Linear(spec.width, spec.classes)

    def advance(self, progress: float) -> None:
        """Select in every block at first, then in stages."""
        assert self.spec is not None
        super().advance(progress)
        starts = self._starts
        early = progress < self.layerwise or self.layerwise == 1
        self.acts = tuple(range(starts[0], self.spec.depth)) if early else starts
        self.ends = (*(start - 1 for start in self.acts[1:]), self.spec.depth - 1)
        self.schedule = Schedule(self.acts, (self.keep,) * len(self.acts))

    def spans(self) -> frozenset[int]:
        """Patches wait from the first stage to the end."""
        assert self.spec is not None
        return frozenset(range(self.acts[0], self.spec.depth))

    def wants(self, block: int) -> bool:
        """Scores are read from the block before the first stage on."""
        return block >= self.acts[0] - 1

    def between(self, block: int, state: TokenState, seen: Seen) -> TokenState:
        """Update the scores of the tokens that were processed."""
        score = state.layout.flat(seen.cls_row().detach())
        if block >= self.acts[0]:
            old = state.extras[_SCORE]
            score = (1 - self.tradeoff) * old + self.tradeoff * score
        return state.replace(extras={**state.extras, _SCORE: score})

    def before(self, block: int, state: TokenState) -> TokenState:
        """Start a stage: park what is not selected, with one token to stand for it."""
        if block not in self.acts:
            return state
        original = state.notes.get("original", (state.patches,) * state.batch)
        now = state.counts
        counts = [self.schedule.count(0, n0, n) for n0, n in zip(original, now, strict=True)]
        if counts == list(now):
            return state
        score = state.after_prefix(state.extras[_SCORE], float("-inf"))
        idx, valid = top_k(score, counts[0] if state.layout.is_even else counts)
        inner = state.park(idx, valid)
        if self.variant == "deit":
            return inner
        token = self._representative(state, score, idx, valid)
        exists = None
        if valid is not None:
            exists = torch.tensor([k < n for k, n in zip(counts, now, strict=True)])
            exists = exists.to(token.device)
        inner = inner.append(token, exists)
        return self.note(inner, "representative", (token, exists))

    @staticmethod
    def _representative(
        state: TokenState, score: Tensor, idx: Tensor, valid: Tensor | None
    ) -> Tensor:
        """Score-weighted mean of the parked patches, ``[B, C]``."""
        weight = zero_at(score.clamp_min(0.0), idx, valid)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-12)
        tokens = state.after_prefix(state.x)
        return (weight.to(tokens.dtype)[:, None, :] @ tokens).squeeze(1)

    def after(self, block: int, state: TokenState) -> TokenState:
        """End a stage: what the blocks added to the representative goes to the parked ones."""
        if block not in self.ends or state.outer is None:
            return state
        if self.variant == "deit":
            return state.recall()
        token, exists = self.noted(state.notes, "representative")
        last = torch.tensor(state.layout.lengths, device=token.device) - 1
        now = state.x.index_select(0, state.layout.start(token.device) + last)
        change = now - token
        if exists is not None:
            change = change * exists[:, None]
        return state.discard(exists).recall(change)

    def finish(self, state: TokenState) -> TokenState:
        """Note the auxiliary classifier's logits."""
        if not self.aux:
            return state
        token = self.aux_norm(state.prefix_tokens()[:, 0])
        return self.note(state, "aux_logits", self.aux_head(token))

    def reads(self, block: int, tokens: int, left: int) -> bool:
        """Scores are updated in every block from the one before the first stage on."""
        return self.wants(block)

    def macs(self, block: int, hook: str, tokens: int, left: int) -> int:
        """The representative token, and the auxiliary head at the end."""
        assert self.spec is not None
        total = 0
        if hook == "before" and block in self.acts and self.variant == "paper" and left < tokens:
            total += (tokens - self.spec.prefix) * self.spec.width
        if self.aux and hook == "after" and block == self.spec.depth - 1:
            total += linear_cost(self.aux_head)
        return total

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """The selected share and the representative inside a stage, everything outside."""
        patches = grid[0] * grid[1]
        if hook == "before" and block in self.acts:
            count = self.schedule.count(0, patches, patches)
            return count + (1 if self.variant == "paper" and count < patches else 0)
        return patches if hook == "after" and block in self.ends else current
