"""ATS: sample the tokens that matter, as many as an image needs.

Paper: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022.

Scored: attention of the class token times the length of the value vector, per head, summed over
heads. K quantiles of the cumulative score pick tokens; those picked more than once count once, so
an image keeps at most K and often fewer. The others are dropped.

Training: none needed; the indices carry no gradient, everything else does. The rows of attention
that the paper resamples are independent, so choosing rows after the residual is the same.

Deviation of the release: it sums attention over heads before multiplying with the length of the
concatenated values, sorts the scores, stretches the distribution to [0, 1] and starts its grid at
the smallest value: ``variant="release"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import (
    AttentionReader,
    BackboneSpec,
    Reducer,
    TokenState,
    check_blocks,
    check_choice,
)
from foveate.ops import inverse_transform, nearest
from foveate.registry import register

__all__ = ["ATS"]


@register("ats")
@dataclass(eq=False, kw_only=True, repr=False)
class ATS(Reducer):
    """Inverse-transform sampling of tokens.

    Attributes:
        K: largest number of tokens that an image keeps, for all stages or one number for each; None
            is its number of patches, so that only repeated picks reduce.
        blocks: numbers of the blocks that sample, counted from 0. None means every block from a
            quarter of the depth on (multi-stage); one block alone is the paper's single-stage form.
        variant: how scores are computed: as in the "paper" or as in the "release".
    """

    K: int | tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    variant: str = "paper"

    paper: ClassVar[str] = "Fayyaz et al., ATS, ECCV 2022"
    summary: ClassVar[str] = "samples as many tokens as an image needs, at most K"
    hooks: ClassVar[tuple[str, ...]] = ("between",)
    reads: ClassVar[frozenset[str]] = frozenset({"cls_row", "value_norm"})
    drops: ClassVar[bool] = True
    maskable: ClassVar[bool] = True
    rate: ClassVar[str] = "K"
    identity: ClassVar[Mapping[str, Any] | None] = None

    def validate(self) -> None:
        """Refuse K below 1."""
        if self.blocks is not None:
            check_blocks(self.blocks)
        check_choice("variant", self.variant, ("paper", "release"))
        for k in self.K if isinstance(self.K, tuple) else (self.K,):
            if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
                raise ValueError(f"K must be a whole number of at least 1, got {k!r}")

    @property
    def fixed_count(self) -> bool:
        """Every image has its own count."""
        return False

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the blocks."""
        super().build(spec)
        blocks = tuple(range(spec.depth // 4, spec.depth)) if self.blocks is None else self.blocks
        self.active_blocks = check_blocks(blocks, spec.depth)
        if isinstance(self.K, tuple) and len(self.K) != len(self.active_blocks):
            raise ValueError(f"K has {len(self.K)} entries for {len(self.active_blocks)} blocks")

    def _most(self, block: int, patches: int) -> int:
        k = self.K[self.active_blocks.index(block)] if isinstance(self.K, tuple) else self.K
        return patches if k is None else k

    def between(self, block: int, state: TokenState, attention: AttentionReader) -> TokenState:
        """Sample the tokens to keep."""
        score = self._score(state, attention)
        most, present = self._most(block, state.patches), state.present()
        if self.variant == "release":
            marks = self._release(score, most, present)
        else:
            grid = torch.arange(1, 2 * most, 2, device=score.device, dtype=torch.float64)
            marks = inverse_transform(score, grid / (2 * most), present)
        if state.alive is not None:
            return state.mask_out(marks.to(state.alive.dtype))
        return state.keep_where(marks)

    def _score(self, state: TokenState, attention: AttentionReader) -> Tensor:
        """Return the significance of each token after the prefix, ``[B, N]``."""
        row, length = attention.cls_row_heads().detach(), attention.value_norm().detach()
        if self.variant == "release":
            score = row.sum(1) * length.square().sum(1).sqrt()
        else:
            score = (row * length).sum(1)
        return score[:, state.prefix :]

    @staticmethod
    def _release(score: Tensor, most: int, present: Tensor | None) -> Tensor:
        """Sample as the release: sorted scores, stretched distribution, grid from its minimum."""
        score = score.double()
        if present is not None:  # padding and dead tokens sort to the front
            score = score.masked_fill(~present, -1.0)
        ordered, order = score.sort(1)
        alive = None if present is None else present.gather(1, order)
        cdf = ordered.clamp_min(0.0).cumsum(1)
        high, low = cdf[:, -1:], cdf[:, :1]
        if alive is not None:
            low = cdf.gather(1, alive.to(torch.uint8).argmax(1, keepdim=True))
        cdf = (cdf - low).clamp_min(0.0) / (high - low).clamp_min(torch.finfo(cdf.dtype).tiny)
        start = torch.where(cdf > 0, cdf, torch.ones_like(cdf)).amin(1, keepdim=True)
        step = torch.arange(most, device=cdf.device, dtype=cdf.dtype) / max(1, most - 1)
        marks = nearest(cdf, start + (1 - start) * step, alive)
        return torch.zeros_like(marks).scatter(1, order, marks)

    def at_level(self, level: float) -> dict[str, Any]:
        """Return the largest number of tokens that any image may keep."""
        assert self.spec is not None
        patches = self.spec.grid[0] * self.spec.grid[1]
        return {"K": max(1, round((1 - level) * patches))}

    def own_macs(self, block: int, hook: str, tokens: int) -> int:
        """Count the class token's attention, or the whole map if there is no class token."""
        assert self.spec is not None
        if hook != "between" or block not in self.active_blocks:
            return 0
        width = self.spec.heads * self.spec.head_dim
        return (self.spec.heads if self.spec.class_token else tokens) * tokens * width

    def expected_count(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Expect at most K; how many fewer depends on the image."""
        if hook != "between" or block not in self.active_blocks:
            return current
        return min(current, self._most(block, grid[0] * grid[1]))
