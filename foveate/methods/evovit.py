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
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import (
    AttentionReader,
    BackboneSpec,
    Outcome,
    Reducer,
    Schedule,
    Selection,
    TokenState,
    check_blocks,
    check_choice,
    check_keep,
)
from foveate.core.disposal import fused
from foveate.core.reducer import keeps_all, scheduled_counts
from foveate.registry import register

__all__ = ["EvoViT"]

_SCORE, _STAND_IN, _AUX = "evovit.score", "evovit.representative", "evovit.aux_logits"


@register("evovit")
@dataclass(eq=False, kw_only=True, repr=False)
class EvoViT(Reducer):
    """Slow and fast token evolution.

    Attributes:
        keep: share of all patches that a stage processes.
        starts: first block of each stage; a stage lasts until the next. None is a third and two
            thirds of the depth.
        layerwise: select again in every block from the first start on; a number is the share of
            training, from its beginning, during which this holds (the paper's: 2 / 3).
        tradeoff: weight of the newest attention in the running score from the first stage on.
        variant: "paper", or "deit" for the released DeiT models.
        aux: train an auxiliary classifier on the class token.
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
    reads: ClassVar[frozenset[str]] = frozenset({"cls_row"})
    training_need: ClassVar[str] = "required"
    parks: ClassVar[bool] = True
    rate: ClassVar[str] = "keep"
    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0}
    default_loss_weights: ClassVar[Mapping[str, float]] = {"class": 0.5, "aux": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.aux:  # without the head the class loss is the only one
            self.loss_weights = {}

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
        self.active_blocks = tuple(range(starts[0], self.spec.depth)) if early else starts
        self.ends = (*(start - 1 for start in self.active_blocks[1:]), self.spec.depth - 1)
        self.schedule = Schedule(self.active_blocks, (self.keep,) * len(self.active_blocks))

    @property
    def settled(self) -> bool:
        """Whether the selection in every block is over, or never ends."""
        return self.layerwise == 1 or self.progress >= self.layerwise

    def parked_blocks(self) -> frozenset[int]:
        """Return the blocks from the first stage on, because patches wait during them."""
        assert self.spec is not None
        return frozenset(range(self.active_blocks[0], self.spec.depth))

    def acts_between(self, block: int) -> bool:
        """Tell whether scores are read here: from the block before the first stage on."""
        return block >= self.active_blocks[0] - 1

    def between(self, block: int, state: TokenState, attention: AttentionReader) -> TokenState:
        """Update the scores of the tokens that were processed."""
        score = state.layout.flat(attention.cls_row().detach())
        if block >= self.active_blocks[0]:
            old = state.extras[_SCORE]
            score = (1 - self.tradeoff) * old + self.tradeoff * score
        return state.replace(extras={**state.extras, _SCORE: score})

    def before(self, block: int, state: TokenState) -> TokenState:
        """Start a stage: park the patches that are not selected; one token represents them."""
        if block not in self.active_blocks:
            return state
        k = scheduled_counts(self.schedule, 0, state)
        if keeps_all(state, k):
            return state
        score = state.after_prefix(state.extras[_SCORE], float("-inf"))
        kept = Selection.best(score, k)
        inner = state.park(kept)
        if self.variant == "deit":
            return inner
        token = fused(state, kept, score.clamp_min(0.0), mean=True)
        exists = kept.fewer_than(state.counts) if kept.lengths is not None else None
        return inner.append(token, exists).note(_STAND_IN, (token, exists))

    def after(self, block: int, state: TokenState) -> TokenState:
        """End a stage: add to the parked patches what the blocks added to the representative."""
        if block not in self.ends or state.parked is None:
            return state
        if self.variant == "deit":
            return state.recall()
        token, exists = state.notes[_STAND_IN]
        if state.layout.is_even:
            now = state.tokens()[:, -1]
        else:
            last = torch.tensor(state.layout.lengths, device=token.device) - 1
            now = state.x.index_select(0, state.layout.start(token.device) + last)
        change = now - token
        if exists is not None:
            change = change * exists[:, None]
        return state.discard_last(exists).recall(change)

    def finish(self, state: TokenState) -> TokenState:
        """Note the auxiliary classifier's logits."""
        if not self.aux:
            return state
        token = self.aux_norm(state.prefix_tokens()[:, 0])
        return state.note(_AUX, self.aux_head(token))

    def losses(
        self, outcome: Outcome, targets: Tensor | None = None, teacher: Outcome | None = None
    ) -> dict[str, Tensor]:
        """Add the auxiliary classifier's cross entropy."""
        found = super().losses(outcome, targets, teacher)
        if targets is not None and _AUX in outcome.notes:
            found["aux"] = F.cross_entropy(outcome.notes[_AUX].float(), targets)
        return found
