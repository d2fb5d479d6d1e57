"""Token mergence: average each inattentive patch into the attended one it resembles most.

Paper: "Multi-Scale And Token Mergence: Make Your ViT More Efficient", arXiv 2306.04897.

Scored: attention of the class token, mean over heads, as in EViT. Every token that is not kept is
merged into its most similar kept token, an average weighted with those scores. Each stage keeps
``ceil(keep * current)``.

Training: recommended (the paper trains for 300 epochs with the rate warmed up from 1). The paper
leaves open which features are compared: here the tokens after the attention residual. Prefix
tokens are no merge targets, their score being undefined. The multi-scale stem of the paper is
under-specified and not part of this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import ScoreReducer, Seen, TokenState, check_choice
from foveate.ops import best_partner, complement, hashed, pairwise
from foveate.registry import register

__all__ = ["TokenMergence"]

_SIMILARITIES = ("cosine", "l1", "l2", "attention", "random")


@register("tokenmergence")
@dataclass(eq=False, kw_only=True, repr=False)
class TokenMergence(ScoreReducer):
    """Importance-weighted merging into the most similar crucial token.

    Attributes:
        similarity: "cosine", "l1", "l2", "attention" (how strongly the token attends to each kept
            one) or "random" (a fixed pseudo-random partner).
    """

    relative: str = "current"
    rounding: str = "ceil"
    similarity: str = "cosine"

    paper: ClassVar[str] = "Multi-Scale And Token Mergence, arXiv 2306.04897"
    summary: ClassVar[str] = "averages inattentive patches into the most similar attended one"
    hooks: ClassVar[tuple[str, ...]] = ("between",)
    training_need: ClassVar[str] = "recommended"
    drops: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"cls_row"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity == "attention":
            vars(self)["needs"] = frozenset({"cls_row", "attention"})

    def validate(self) -> None:
        """Check the similarity besides the schedule."""
        super().validate()
        check_choice("similarity", self.similarity, _SIMILARITIES)

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
        """Merge every token that is not kept into its most similar kept one."""
        idx_src, valid_src = complement(idx, score.shape[1], valid, state.present())
        with torch.no_grad():
            similarity = self._similarity(state, seen, idx, idx_src)
            _, into = best_partner(similarity, valid)
        return state.merge(
            idx,
            idx_src,
            into,
            score.clamp_min(0.0),  # padding was marked with -inf
            valid_keep=valid,
            valid_src=valid_src,
            track_size=False,
        )

    def _similarity(
        self, state: TokenState, seen: Seen | None, idx: Tensor, idx_src: Tensor
    ) -> Tensor:
        """How alike each leaving token is to each kept one, ``[B, R, K]``."""
        if self.similarity == "attention":
            assert seen is not None
            front = state.prefix
            rows = seen.attention()[:, front:, front:]
            rows = rows.gather(1, idx_src[..., None].expand(-1, -1, rows.shape[2]))
            return rows.gather(2, idx[:, None].expand(-1, idx_src.shape[1], -1))
        if self.similarity == "random":
            pair = idx_src[:, :, None] * 65537 + idx[:, None, :]
            return hashed(pair, state.layout.longest)
        width = state.x.shape[1]
        src, kept = (
            state.x.index_select(
                0, state.layout.rows(i + state.prefix).clamp_max(len(state.x) - 1)
            ).view(*i.shape, width)
            for i in (idx_src, idx)
        )
        return pairwise(src, kept, self.similarity)

    def macs(self, block: int, hook: str, tokens: int, left: int) -> int:
        """The similarity of every token that leaves to every kept one."""
        if (
            hook != "between"
            or block not in self.acts
            or self.similarity in ("attention", "random")
        ):
            return 0
        assert self.spec is not None
        return (tokens - left) * (left - self.spec.prefix) * self.spec.width
