"""GatedReducer: methods that learn which tokens to drop, stage by stage, for good.

Written once here: the decision (sampled, arg-max or top-k), its masked form for training and its
gathered and packed forms, nesting, and the ratio loss. A method overrides ``logits`` and, if
dropped tokens leave something behind, ``leave``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core.gates import DECISIONS, decide, ratio_loss
from foveate.core.reducer import ScoreReducer, Seen
from foveate.core.schedule import check_choice
from foveate.core.tokens import TokenState

__all__ = ["GatedReducer"]


@dataclass(eq=False, kw_only=True, repr=False)
class GatedReducer(ScoreReducer):
    """Drops tokens by learned gates before its blocks.

    Attributes:
        gate: how gates decide: "sample", "argmax", "topk"; None samples while training masked
            and otherwise takes the method's own deterministic rule (``rule``).
    """

    gate: str | None = None

    hooks: ClassVar[tuple[str, ...]] = ("before",)
    training_need: ClassVar[str] = "required"
    gated: ClassVar[bool] = True
    maskable: ClassVar[bool] = True
    rule: ClassVar[str] = "topk"
    ratio_per_image: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0, "gate": "topk"}

    def validate(self) -> None:
        """Check the gate's rule besides the schedule."""
        super().validate()
        check_choice("gate", self.gate, (None, *DECISIONS))

    @property
    def fixed_count(self) -> bool:
        """Counts are fixed unless every image decides for itself."""
        return (self.gate or self.rule) == "topk"

    def logits(self, stage: int, state: TokenState) -> Tensor:
        """Log-probabilities of keeping and dropping each token after the prefix, ``[B, N, 2]``."""
        raise NotImplementedError

    def candidates(self, state: TokenState) -> Tensor | None:
        """Tokens that may be dropped, ``[B, N]`` bool; None means all. Others always stay."""
        return None

    def leave(
        self, before: TokenState, after: TokenState, dropped: Tensor, logits: Tensor
    ) -> TokenState:
        """Let the tokens ``dropped [B, N]`` (of ``before``) leave something in ``after``."""
        return after

    def before(self, block: int, state: TokenState) -> TokenState:
        """Decide at a stage's first block."""
        if block not in self.acts:
            return state
        stage = self.acts.index(block)
        masked = state.alive is not None
        how = self.gate
        if how is None:
            how = "sample" if masked and state.notes["training"] else self.rule
        candidates = self.candidates(state)
        if how == "topk" and not masked and candidates is None:
            return self._stage(stage, state, None)  # static sizes: the deployed form
        logits = self.logits(stage, state)
        present = state.present()
        eligible = _both(present, candidates)
        counts = self._droppable_counts(stage, state, logits, eligible) if how == "topk" else None
        if masked:
            # Patches that an earlier stage dropped are gated like the others: what they are worth
            # later is what the earlier gate has to learn.
            gone = None if present is None else ~present
            keep = decide(
                logits[..., :2], how, k=counts, candidates=candidates, gone=gone, at_least_one=True
            )
        else:
            keep = decide(logits[..., :2], how, k=counts, candidates=eligible, at_least_one=True)
        if candidates is not None:
            keep = torch.where(candidates, keep, torch.ones_like(keep))
        state = self._note(stage, state, keep, candidates)
        if masked:
            assert state.alive is not None
            dropped = state.alive[:, state.prefix :] * (1 - keep)
            return self.leave(state, state.mask_out(keep), dropped, logits)
        gone = (keep <= 0) if present is None else (keep <= 0) & present
        return self.leave(state, state.keep_where(~gone), gone.to(keep.dtype), logits)

    def score(self, stage: int, state: TokenState, seen: Seen | None) -> Tensor:
        """Log-odds of keeping."""
        logits = self.logits(stage, state)
        return logits[..., 0] - logits[..., 1]

    def scoring(self, stage: int, tokens: int) -> int:
        """Multiply-adds of ``logits`` on an image of so many tokens, prefix included."""
        return 0

    def macs(self, block: int, hook: str, tokens: int, left: int) -> int:
        """Scoring, wherever anything may be dropped."""
        if hook != "before" or block not in self.acts or (self.fixed_count and left == tokens):
            return 0
        return self.scoring(self.acts.index(block), tokens)

    def _droppable_counts(
        self, stage: int, state: TokenState, logits: Tensor, eligible: Tensor | None
    ) -> list[int]:
        """How many of each image's droppable live tokens "topk" keeps."""
        if eligible is None:
            now = [logits.shape[1]] * logits.shape[0]
        else:
            now = eligible.sum(1).tolist()
        original = self.original(state)
        return [
            self.schedule.count(stage, n0, n, self.progress) if n else 0
            for n0, n in zip(original, now, strict=True)
        ]

    def _note(
        self, stage: int, state: TokenState, keep: Tensor, candidates: Tensor | None
    ) -> TokenState:
        """Record which share of an image's patches this stage left, for the ratio loss."""
        live = keep if state.alive is None else keep * state.alive[:, state.prefix :]
        if candidates is not None:
            live = live * candidates
        present = state.layout.valid(keep.device)
        if present is not None:
            live = live * present[:, state.prefix :]
        original = torch.tensor(self.original(state), device=keep.device)
        share = live.sum(1) / original
        shares = {**self.noted(state.notes, "kept_share", {}), stage: share}
        return self.note(state, "kept_share", shares)

    def losses(self, notes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Distance of the kept shares from the schedule's."""
        return ratio_loss(
            self.noted(notes, "kept_share", {}),
            lambda stage: self.schedule.share(stage, self.progress),
            self.ratio_per_image,
        )


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a & b
