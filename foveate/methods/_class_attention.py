"""Class attention as a score: keep the patches that the class token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.core import AttentionReader, ScoreReducer, TokenState

__all__ = ["ClassAttention"]


@dataclass(eq=False, kw_only=True, repr=False)
class ClassAttention(ScoreReducer):
    """Scores a patch by the class token's attention to it in the block itself, mean over heads."""

    hook: ClassVar[str] = "between"
    hooks: ClassVar[tuple[str, ...]] = ("between",)
    reads: ClassVar[frozenset[str]] = frozenset({"cls_row"})

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        """Return the attention of the class token."""
        assert attention is not None
        return attention.cls_row()[:, state.prefix :]
