"""GatedReducer: the base of methods that learn gates, one before each of some blocks.

The decision (sampled, arg-max or top-k), its masked form for training, its gathered and packed
forms, and the losses are written once here. A method overrides ``logits``; ``dispose`` and ``hide``
determine what becomes of the tokens that a gate does not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core.attention import AttentionReader
from foveate.core.gates import DECISIONS, decide
from foveate.core.losses import ratio_loss, token_distillation
from foveate.core.reducer import ScoreReducer
from foveate.core.schedule import check_choice
from foveate.core.selection import Selection
from foveate.core.tokens import TokenState
from foveate.core.trace import Outcome

__all__ = ["GatedReducer"]


@dataclass(eq=False, kw_only=True, repr=False)
class GatedReducer(ScoreReducer):
    """Decides by learned gates which tokens its blocks get.

    Attributes:
        gate: how gates decide: "sample", "argmax" or "topk"; None samples while training in masked
            mode, and otherwise uses the method's own deterministic rule (``rule``).
    """

    gate: str | None = None

    training_need: ClassVar[str] = "required"
    gated: ClassVar[bool] = True
    maskable: ClassVar[bool] = True
    rule: ClassVar[str] = "topk"
    ratio_per_image: ClassVar[bool] = True
    lasting: ClassVar[bool] = True  # tokens that a gate does not keep never come back
    softmax_eps: ClassVar[float | None] = 0.0
    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0, "gate": "topk"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.token_loss = "mse"  # how the "token" loss compares tokens: "mse" or "kl"
        # Only the method's own disposal has a masked form to train in.
        vars(self)["maskable"] = self.rest == type(self).rest

    def validate(self) -> None:
        """Check the schedule and how gates decide."""
        super().validate()
        check_choice("gate", self.gate, (None, *DECISIONS))

    @property
    def fixed_count(self) -> bool:
        """Counts are fixed unless every image decides for itself."""
        return (self.gate or self.rule) == "topk"

    # To override ---------------------------------------------------------------------------------

    def logits(self, stage: int, state: TokenState) -> Tensor:
        """Score keeping and dropping each gated token, ``[B, N, 2]``; only their odds count."""
        raise NotImplementedError

    def exempt(self, state: TokenState) -> Tensor | None:
        """Mark the gated tokens that gates must keep, ``[B, N]`` bool; None means none."""
        return None

    def usable(self, stage: int, state: TokenState) -> Tensor | None:
        """Mark the gated tokens that may be kept, ``[B, N]`` bool; None means all."""
        return None

    def front(self, stage: int, state: TokenState) -> int:
        """Return the position of the first token that the gate decides about."""
        return state.prefix

    def hide(self, stage: int, state: TokenState, keep: Tensor) -> TokenState:
        """Apply decisions in masked mode, where they carry the gates' gradient."""
        return state.mask_out(keep)

    def shift(self, stage: int, amount: float) -> None:
        """Add a number to a gate's log-odds of keeping, permanently; calibration calls this."""
        raise ValueError(f"the gates of {self.name} have no bias of their own to calibrate")

    # Deciding ------------------------------------------------------------------------------------

    def candidates(self, stage: int, state: TokenState, odds: Tensor) -> tuple[Tensor, int]:
        """Return the odds of tokens that a gate may keep, ``[M]``, and the base of its share.

        The base is the number of patches, and gated prefix tokens, that the images began with.
        """
        exempt = self.exempt(state)
        free = None if exempt is None else ~exempt
        free = _both(free, _both(self.usable(stage, state), self._present(stage, state)))
        prefix = state.prefix - self.front(stage, state)
        count = sum(state.original) + prefix * state.batch
        return (odds.flatten() if free is None else odds[free]), count

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        """Score a token by the log-odds of keeping it."""
        return log_odds(self.logits(stage, state))

    def weights(self, score: Tensor) -> Tensor:
        """Weigh tokens by the probability of keeping them."""
        return score.sigmoid()

    def before(self, block: int, state: TokenState) -> TokenState:
        """Decide before each active block."""
        if block not in self.active_blocks:
            return state
        stage, masked = self.active_blocks.index(block), state.alive is not None
        how = self.gate or ("sample" if masked and state.context.training else self.rule)
        if how == "topk" and not masked and state.layout.is_even:
            return self._stage(stage, state, None)  # the deployed form has static sizes
        logits = self.logits(stage, state)
        keep = self.decide(stage, state, logits, how)
        return self.close(stage, self._note(stage, state, keep), keep, logits)

    def close(self, stage: int, state: TokenState, keep: Tensor, logits: Tensor) -> TokenState:
        """Carry out the decisions ``keep [B, N]``."""
        if state.alive is not None:
            return self.hide(stage, state, keep)
        present = self._present(stage, state)
        kept = Selection.where(keep > 0 if present is None else (keep > 0) & present)
        return self.dispose(state, kept, log_odds(logits))

    def decide(self, stage: int, state: TokenState, logits: Tensor, how: str) -> Tensor:
        """Decide about every gated token: ``[B, N]`` in {0, 1}, with the gradient of the gates."""
        present, exempt = self._present(stage, state), self.exempt(state)
        candidates, gone = self.usable(stage, state), None
        if exempt is not None:
            candidates = ~exempt if candidates is None else candidates & ~exempt
        if self.lasting and state.alive is not None and present is not None:
            # Patches that an earlier stage dropped get a decision too: the earlier gate learns from
            # it what they would be worth later.
            gone = ~present
        else:
            candidates = _both(candidates, present)
        k: list[int] | None = None
        if how == "topk":
            eligible = _both(candidates, present)
            now = [logits.shape[1]] * state.batch if eligible is None else eligible.sum(1).tolist()
            k = self.gated_counts(stage, state, now)
        keep = decide(
            logits[..., :2],
            how,
            k=k,
            candidates=candidates,
            gone=gone,
            at_least_one=self.lasting,
        )
        return keep if exempt is None else torch.where(exempt, torch.ones_like(keep), keep)

    def gated_counts(self, stage: int, state: TokenState, now: list[int]) -> list[int]:
        """Return how many of each image's eligible tokens "topk" keeps."""
        return [
            self.schedule.count(stage, n0, n, self.progress) if n else 0
            for n0, n in zip(state.original, now, strict=True)
        ]

    def _present(self, stage: int, state: TokenState) -> Tensor | None:
        """Mark the gated tokens that take part, ``[B, N]``; None means all."""
        present = state.layout.valid(state.x.device)
        if state.alive is not None:
            present = state.alive.detach() > 0
        return None if present is None else present[:, self.front(stage, state) :]

    # Training ------------------------------------------------------------------------------------

    def _note(self, stage: int, state: TokenState, keep: Tensor) -> TokenState:
        """Record the share of each image's tokens that this stage kept, for the ratio loss."""
        front, live, exempt = self.front(stage, state), keep, self.exempt(state)
        if state.alive is not None:
            live = live * state.alive[:, front:]
        if exempt is not None:
            live = live * ~exempt
        present = state.layout.valid(keep.device)
        if present is not None:
            live = live * present[:, front:]
        original = state.context.original or (state.patches,)
        alike = len(set(original)) == 1  # a plain number need not be copied to a GPU
        count = original[0] if alike else live.new_tensor(original)
        share = live.sum(1) / (count + state.prefix - front)
        return state.note(self._key, {**state.notes.get(self._key, {}), stage: share})

    @property
    def _key(self) -> str:
        return f"{self.name}.kept_share"

    def target(self, stage: int) -> float:
        """Return the share of patches that a stage should keep."""
        return self.schedule.share(stage, self.progress)

    def losses(
        self, outcome: Outcome, targets: Tensor | None = None, teacher: Outcome | None = None
    ) -> dict[str, Tensor]:
        """Add "ratio", the distance of kept shares from the schedule, and "token".

        "token" compares the final tokens that were kept with the teacher's.
        """
        shares = outcome.notes.get(self._key, {})
        found = ratio_loss(shares, self.target, self.ratio_per_image)
        found |= super().losses(outcome, targets, teacher)
        if teacher is not None and self.loss_weights.get("token"):
            state = outcome.state
            assert state.alive is not None  # gates train masked
            patches = slice(state.prefix, state.prefix + state.patches)  # package tokens follow
            found["token"] = token_distillation(
                state.tokens()[:, patches],
                teacher.state.tokens()[:, teacher.state.prefix :],
                state.alive[:, patches],
                self.token_loss,
            )
        return found

    # Counts that depend on the image -------------------------------------------------------------

    def gate_macs(self, stage: int, tokens: int) -> int:
        """Count the multiply-adds of ``logits`` on this number of tokens, prefix included."""
        return 0

    def own_macs(self, block: int, hook: str, tokens: int) -> int:
        """Count the block's gate on all tokens that reach it."""
        if hook != "before" or block not in self.active_blocks:
            return 0
        return self.gate_macs(self.active_blocks.index(block), tokens)

    def expected_count(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Expect gates to keep their target shares."""
        if hook != "before" or block not in self.active_blocks:
            return current
        stage = self.active_blocks.index(block)
        return self.schedule.count(stage, grid[0] * grid[1], current, self.progress)


def log_odds(logits: Tensor) -> Tensor:
    """Return the log-odds of keeping, ``[B, N]`` float32."""
    return (logits[..., 0] - logits[..., 1]).float()


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a & b
