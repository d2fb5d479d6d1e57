"""ToMe: in every block, merge the r most similar pairs of tokens.

Paper: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.

Matched: tokens split alternately into two sets; each of the first finds its most similar partner
in the second by cosine similarity of head-averaged keys, and the r best pairs merge by a mean
weighted with the patches each stands for. Nothing is dropped. Attention then weighs every key by
its size (proportional attention). Prefix tokens are never merged.

Training: none needed; the paper also trains with it. For MAE models that were not fine-tuned with
merging, proportional attention hurts: ``prop_attn=False``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import BackboneSpec, Match, MatchReducer, Seen, TokenState, check_blocks
from foveate.ops import alternate_split, best_partner, complement, pairwise, top_k
from foveate.registry import register

__all__ = ["ToMe"]


@register("tome")
@dataclass(eq=False, kw_only=True, repr=False)
class ToMe(MatchReducer):
    """Bipartite soft matching and size-weighted merging.

    Attributes:
        r: tokens merged away in each block, or one number for each block in turn (then 0).
        inflection: spreads an r linearly from ``r * (1 - inflection)`` in the first block to
            ``r * (1 + inflection)`` in the last; -1 merges early, 1 late, 0 is constant.
        blocks: where to merge; None is every block.
        prop_attn: weigh keys by the patches they stand for.
    """

    r: int | tuple[int, ...] = 13
    inflection: float = 0.0
    blocks: tuple[int, ...] | None = None
    prop_attn: bool = True

    paper: ClassVar[str] = "Bolya et al., Token Merging, ICLR 2023"
    summary: ClassVar[str] = "merges the most similar pairs of tokens in every block"
    needs: ClassVar[frozenset[str]] = frozenset({"key_mean"})
    rate: ClassVar[str] = "r"
    identity: ClassVar[Mapping[str, Any] | None] = {"r": 0}

    def validate(self) -> None:
        """Refuse negative counts and inflections beyond a straight line through zero."""
        if self.blocks is not None:
            check_blocks(self.blocks)
        for r in self.r if isinstance(self.r, Sequence) else (self.r,):
            if isinstance(r, bool) or not isinstance(r, int) or r < 0:
                raise ValueError(f"r must be a whole number of at least 0, got {r!r}")
        if not -1 <= self.inflection <= 1:
            raise ValueError(f"inflection must lie in [-1, 1], got {self.inflection!r}")
        if self.inflection and isinstance(self.r, Sequence):
            raise ValueError("inflection spreads a single r; a list of r says it all already")

    @property
    def proportional(self) -> bool:
        """Proportional attention, unless switched off."""
        return self.prop_attn

    def build(self, spec: BackboneSpec) -> None:
        """Resolve r for every block and refuse more than half of the patches."""
        super().build(spec)
        blocks = tuple(range(spec.depth)) if self.blocks is None else self.blocks
        self.acts = check_blocks(blocks, spec.depth)
        self.removed = dict(zip(self.acts, self._per_block(len(self.acts)), strict=True))
        most = spec.grid[0] * spec.grid[1] // 2
        for r in self.removed.values():
            if r > most:
                raise ValueError(
                    f"r must lie in 0..{most} (half of the {spec.grid[0] * spec.grid[1]} patches "
                    f"at the model's own size), got {r}"
                )

    def _per_block(self, blocks: int) -> list[int]:
        if isinstance(self.r, Sequence):
            if len(self.r) > blocks:
                raise ValueError(f"r has {len(self.r)} entries for {blocks} blocks")
            return list(self.r) + [0] * (blocks - len(self.r))
        first, last = self.r * (1 - self.inflection), self.r * (1 + self.inflection)
        step = (last - first) / max(1, blocks - 1)
        return [int(first + step * i) for i in range(blocks)]

    def wants(self, block: int) -> bool:
        """Keys are read only where anything is merged."""
        return super().wants(block) and self.removed[block] > 0

    def match(self, block: int, state: TokenState, seen: Seen | None) -> Match | None:
        """Pair up tokens and pick the most similar pairs."""
        assert seen is not None
        counts = state.counts
        removed = [min(self.removed[block], n // 2) for n in counts]
        if not any(removed):
            return None
        count, device = max(counts), state.x.device
        sources, targets = alternate_split(count, state.prefix % 2 == 0)
        metric = state.after_prefix(seen.key_mean().detach()).float()
        present = state.present()
        there = None if present is None else present[:, targets]
        similarity = pairwise(metric[:, sources], metric[:, targets], "cosine")
        value, partner = best_partner(similarity, there)
        positions = torch.arange(count, device=device).expand(state.batch, -1)
        source_at, target_at = positions[:, sources], positions[:, targets]
        weight = state.after_prefix(
            state.x.new_ones(state.layout.total, dtype=torch.float32)
            if state.size is None
            else state.size.clamp_min(1.0)  # a fused token stands for no patch but has a value
        )
        if present is None:
            merged, _ = top_k(value, removed[0])
            stay, _ = complement(merged, value.shape[1])
            idx_keep = torch.cat([source_at.gather(1, stay), target_at], 1)
            into = stay.shape[1] + partner.gather(1, merged)
            return Match(idx_keep, source_at.gather(1, merged), into, weight)
        return self._ragged(removed, value, partner, present, sources, source_at, target_at, weight)

    @staticmethod
    def _ragged(
        removed: list[int],
        value: Tensor,
        partner: Tensor,
        present: Tensor,
        sources: slice,
        source_at: Tensor,
        target_at: Tensor,
        weight: Tensor,
    ) -> Match:
        """The same where images differ in count: padding stays out of every list."""
        here = present[:, sources]
        merged, valid = top_k(value.masked_fill(~here, float("-inf")), removed)
        stay, valid_stay = complement(merged, value.shape[1], valid, here)
        assert valid is not None and valid_stay is not None
        idx_keep = torch.cat([source_at.gather(1, stay), target_at], 1)
        valid_keep = torch.cat([valid_stay, present.gather(1, target_at)], 1)
        # Entries that count go to the left, so that columns are new positions.
        order = (~valid_keep).to(torch.uint8).sort(dim=1, stable=True).indices
        into = valid_stay.sum(1, keepdim=True) + partner.gather(1, merged)
        return Match(
            idx_keep.gather(1, order),
            source_at.gather(1, merged),
            torch.where(valid, into, torch.zeros_like(into)),
            weight,
            valid_keep.gather(1, order),
            valid,
        )

    def at_level(self, level: float) -> dict[str, Any]:
        """A number a block, one more in the first ones where they do not come out even."""
        assert self.spec is not None
        blocks, patches = len(self.acts), self.spec.grid[0] * self.spec.grid[1]
        each, more = divmod(round(level * min(patches, blocks * (patches // 2))), blocks)
        if not more:
            return {"r": each}
        return {"r": tuple(each + (i < more) for i in range(blocks))}

    def macs(self, block: int, hook: str, tokens: int, left: int) -> int:
        """The similarity of every source to every target."""
        if hook != "between" or block not in self.acts or left == tokens:
            return 0
        assert self.spec is not None
        patches = tokens - self.spec.prefix
        return (patches // 2) * (patches - patches // 2) * self.spec.head_dim

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Reduce by r, but never more than half."""
        if hook != "between" or block not in self.acts:
            return current
        return current - min(self.removed[block], current // 2)
