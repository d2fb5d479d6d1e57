"""Static: one learned mask for all images. The control for methods that select by image.

Paper: a baseline of Rao et al., "DynamicViT", NeurIPS 2021 (its ablation of pruning strategies).

Scored: every position of the grid by a learned number, the same for all images. The others are
dropped. Training: required, as for DynamicViT; deployed, the best-scored positions are gathered.
The scores belong to the grid they were built for and are resized to others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import BackboneSpec, GatedReducer, TokenState
from foveate.registry import register

__all__ = ["Static"]


@register("static")
@dataclass(eq=False, kw_only=True, repr=False)
class Static(GatedReducer):
    """A learned score for every position; the same patches stay in every image."""

    paper: ClassVar[str] = "baseline of Rao et al., DynamicViT, NeurIPS 2021"
    summary: ClassVar[str] = "keeps the same learned positions in every image"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"ratio": 2.0, "kl": 0.5, "token": 0.5}
    softmax_eps: ClassVar[float | None] = 1e-6
    needs_place: ClassVar[bool] = True

    def build(self, spec: BackboneSpec) -> None:
        """Make one score map per stage."""
        super().build(spec)
        self.maps = nn.Parameter(torch.empty(len(self.active_blocks), *spec.grid))
        # The scores are spread far enough that no two positions tie.
        nn.init.trunc_normal_(self.maps, std=0.02)

    def logits(self, stage: int, state: TokenState) -> Tensor:
        """Return the log-odds of each token's position."""
        scores = self.maps[stage]
        if scores.shape != state.grid:
            scores = F.interpolate(
                scores[None, None], state.grid, mode="bicubic", align_corners=False
            )[0, 0]
        assert state.place is not None
        table = torch.cat([scores.flatten().float(), scores.new_zeros(1).float()])
        score = table.index_select(0, state.place)
        return state.after_prefix(torch.stack([F.logsigmoid(score), F.logsigmoid(-score)], -1))
