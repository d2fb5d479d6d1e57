"""EViT: keep the patches the class token attends to, fuse the rest into one token.

Paper: Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022.

Scored: attention of the class token to each patch, mean over heads, in the block itself. The
others become one token, their attention-weighted sum; it competes like any other at the next
stage. Each stage keeps ``ceil(keep * current)``.

Training: recommended (fine-tuning for 30 epochs, or from scratch with the rate warmed up from 1).
The release counts a distillation token as a patch; here prefix tokens are never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import ScoreReducer, Seen, TokenState
from foveate.registry import register

__all__ = ["EViT"]


@register("evit")
@dataclass(eq=False, kw_only=True, repr=False)
class EViT(ScoreReducer):
    """Class attention decides; inattentive patches are fused into one token.

    Attributes:
        fuse: append the attention-weighted sum of the dropped tokens.
    """

    relative: str = "current"
    rounding: str = "ceil"
    fuse: bool = True

    paper: ClassVar[str] = "Liang et al., EViT, ICLR 2022"
    summary: ClassVar[str] = "keeps what the class token attends to, fuses the rest into one token"
    hooks: ClassVar[tuple[str, ...]] = ("between",)
    needs: ClassVar[frozenset[str]] = frozenset({"cls_row"})
    training_need: ClassVar[str] = "recommended"

    def score(self, stage: int, state: TokenState, seen: Seen | None) -> Tensor:
        """Attention of the class token."""
        assert seen is not None
        return seen.cls_row()[:, state.prefix :]

    def reduce(
        self,
        state: TokenState,
        seen: Seen | None,
        score: Tensor,
        idx: Tensor,
        valid: Tensor | None,
    ) -> TokenState:
        """Keep the attended tokens and fuse the others, weighted by attention, un-normalised."""
        if not self.fuse:
            return state.keep(idx, valid)
        exists = None
        if valid is not None:  # images that drop nothing have nothing to fuse
            now = torch.tensor(state.counts, device=idx.device)
            exists = valid.sum(1) < now
            score = score.clamp_min(0.0)  # padding was marked with -inf
        return state.fuse(idx, score, valid, exists)

    def macs(self, block: int, hook: str, tokens: int, left: int) -> int:
        """The fused token, a weighted sum."""
        if not self.fuse or hook != "between" or block not in self.acts or left == tokens:
            return 0
        assert self.spec is not None
        return (tokens - self.spec.prefix) * self.spec.width

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """One more token wherever something is fused."""
        count = super().planned(block, hook, current, grid)
        return count + 1 if self.fuse and count < current else count
