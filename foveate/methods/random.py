"""Random: drop patches at random. This is the control that every scoring method must beat.

Paper: a baseline of Rao et al., "DynamicViT", NeurIPS 2021.

Scored: a random number for every position. In evaluation the numbers follow from ``seed`` alone,
the same for all images, so that results repeat and do not depend on the batch. In training they
are drawn again for every image. The others are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import AttentionReader, ScoreReducer, TokenState
from foveate.ops import hashed
from foveate.registry import register

__all__ = ["Random"]


@register("random")
@dataclass(eq=False, kw_only=True, repr=False)
class Random(ScoreReducer):
    """Random top-k.

    Attributes:
        seed: seed of the numbers used in evaluation.
    """

    seed: int = 0

    paper: ClassVar[str] = "baseline of Rao et al., DynamicViT, NeurIPS 2021"
    summary: ClassVar[str] = "drops patches at random (control)"
    needs_place: ClassVar[bool] = True

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        """Give every token a random number."""
        assert state.place is not None
        if state.context.training:
            noise = torch.rand(state.x.shape[0], device=state.x.device)
        else:
            noise = hashed(state.place, self.seed * 1009 + stage)
        return state.after_prefix(noise)
