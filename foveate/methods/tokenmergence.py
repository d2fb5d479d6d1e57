"""Token mergence: average each inattentive patch into the attended one it resembles most.

Paper: "Multi-Scale And Token Mergence: Make Your ViT More Efficient", arXiv 2306.04897.

Scored: attention of the class token, mean over heads, as in EViT. Every token that is not kept is
merged into its most similar kept token, an average weighted with those scores. Each stage keeps
``ceil(keep * current)``.

Training: recommended (the paper trains for 300 epochs with the rate warmed up from 1). The paper
leaves open which features are compared: here the tokens after the attention residual. Prefix
tokens are not merge targets, because they have no score. The paper's multi-scale features are a
backbone, ``foveate.backbones.multiscale``, on which every method runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.core import AttentionReader, Selection, TokenState, check_choice
from foveate.core.disposal import merge, tokens_of
from foveate.methods._class_attention import ClassAttention
from foveate.ops import hashed, pairwise
from foveate.registry import register

__all__ = ["TokenMergence"]

_SIMILARITIES = ("cosine", "l1", "l2", "attention", "random")


@register("tokenmergence")
@dataclass(eq=False, kw_only=True, repr=False)
class TokenMergence(ClassAttention):
    """Importance-weighted merging into the most similar crucial token.

    Attributes:
        similarity: "cosine", "l1", "l2", "attention" (how strongly the token attends to each kept
            one) or "random" (a fixed pseudo-random partner).
    """

    relative: str = "current"
    rounding: str = "ceil"
    rest: str = "merge"
    similarity: str = "cosine"

    paper: ClassVar[str] = "Multi-Scale And Token Mergence, arXiv 2306.04897"
    summary: ClassVar[str] = "averages inattentive patches into the most similar attended one"
    training_need: ClassVar[str] = "recommended"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity == "attention":
            vars(self)["reads"] = frozenset({"cls_row", "full_map"})

    def validate(self) -> None:
        """Check the schedule and the similarity."""
        super().validate()
        check_choice("similarity", self.similarity, _SIMILARITIES)

    def dispose(
        self,
        state: TokenState,
        kept: Selection,
        score: Tensor,
        attention: AttentionReader | None = None,
    ) -> TokenState:
        """Merge every token that is not kept into its most similar kept one."""
        if self.rest != "merge" or self.similarity == "cosine":
            return super().dispose(state, kept, score, attention)

        def alike(merged: Selection, kept: Selection) -> Tensor:
            if self.similarity == "attention":
                assert attention is not None
                rows = attention.full_map()[:, state.prefix :, state.prefix :]
                rows = rows.gather(1, merged.index[..., None].expand(-1, -1, rows.shape[2]))
                return rows.gather(2, kept.index[:, None].expand(-1, rows.shape[1], -1))
            if self.similarity == "random":
                pair = merged.index[:, :, None] * 65537 + kept.index[:, None, :]
                return hashed(pair, state.layout.longest)
            return pairwise(tokens_of(state, merged), tokens_of(state, kept), self.similarity)

        return merge(state, kept, self.weights(score), alike)
