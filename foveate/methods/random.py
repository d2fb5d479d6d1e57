"""Random: drop patches at random. The control that every scoring method must beat.

Paper: a baseline of Rao et al., "DynamicViT", NeurIPS 2021.

Scored: a random number for every position. In evaluation the numbers follow from ``seed`` alone,
the same for all images, so that results repeat and do not depend on the batch; in training they
are drawn anew for every image. The others are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import ScoreReducer, Seen, TokenState
from foveate.ops import hashed
from foveate.registry import register

__all__ = ["Random"]


@register("random")
@dataclass(eq=False, kw_only=True, repr=False)
class Random(ScoreReducer):
    """Random top-k.

    Attributes:
        seed: of the numbers used in evaluation.
    """

    seed: int = 0

    paper: ClassVar[str] = "baseline of Rao et al., DynamicViT, NeurIPS 2021"
    summary: ClassVar[str] = "drops patches at random (control)"
    hooks: ClassVar[tuple[str, ...]] = ("before",)
    needs_place: ClassVar[bool] = True

    def score(self, stage: int, state: TokenState, seen: Seen | None) -> Tensor:
        """One random number a token."""
        assert state.place is not None
        if state.notes["training"]:
            noise = torch.rand(state.layout.total, device=state.x.device)
        else:
            noise = hashed(state.place, self.seed * 1009 + stage)
        return state.after_prefix(noise)
