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

from foveate.core import (
    AttentionReader,
    BackboneSpec,
    Match,
    MatchReducer,
    Selection,
    TokenState,
    check_removed,
    split_evenly,
)
from foveate.ops import alternate_split, best_partner
from foveate.registry import register

__all__ = ["ToMe"]


@register("tome")
@dataclass(eq=False, kw_only=True, repr=False)
class ToMe(MatchReducer):
    """Bipartite soft matching and size-weighted merging.

    Attributes:
        r: tokens merged away in each block, or one number for each block in turn (then 0). A number
            below 1 is a share of the patches that an image begins with, for images of any size.
        inflection: spreads an r linearly from ``r * (1 - inflection)`` in the first block to
            ``r * (1 + inflection)`` in the last; -1 merges early, 1 late, 0 is constant.
    """

    r: int | float | tuple[int | float, ...] = 13
    inflection: float = 0.0

    paper: ClassVar[str] = "Bolya et al., Token Merging, ICLR 2023"
    summary: ClassVar[str] = "merges the most similar pairs of tokens in every block"
    reads: ClassVar[frozenset[str]] = frozenset({"key_direction"})
    rate: ClassVar[str] = "r"
    identity: ClassVar[Mapping[str, Any] | None] = {"r": 0}

    def validate(self) -> None:
        """Refuse negative counts, and inflections that would make some counts negative."""
        super().validate()
        check_removed(self.r)
        if not -1 <= self.inflection <= 1:
            raise ValueError(f"inflection must lie in [-1, 1], got {self.inflection!r}")
        if self.inflection and isinstance(self.r, Sequence):
            raise ValueError("inflection spreads a single r over blocks: a list of r takes none")

    def build(self, spec: BackboneSpec) -> None:
        """Resolve r for every block and refuse more than half of the patches."""
        super().build(spec)
        self.removed = dict(
            zip(self.active_blocks, self._per_block(len(self.active_blocks)), strict=True)
        )
        most = spec.grid[0] * spec.grid[1] // 2
        for r in self.removed.values():
            if isinstance(r, float) and r > 0.5:
                raise ValueError(f"r must be at most 0.5 of the patches in a block, got {r:g}")
            if r > most:
                raise ValueError(
                    f"r must lie in 0..{most} (half of the {spec.grid[0] * spec.grid[1]} patches "
                    f"at the model's own size), got {r}; a share such as r=0.05 works for any size"
                )

    def _per_block(self, blocks: int) -> list[int | float]:
        if isinstance(self.r, Sequence):
            if len(self.r) > blocks:
                raise ValueError(f"r has {len(self.r)} entries for {blocks} blocks")
            return list(self.r) + [0] * (blocks - len(self.r))
        first, last = self.r * (1 - self.inflection), self.r * (1 + self.inflection)
        step = (last - first) / max(1, blocks - 1)
        each = [first + step * i for i in range(blocks)]
        return [*each] if isinstance(self.r, float) else [int(r) for r in each]

    def acts_between(self, block: int) -> bool:
        """Tell whether anything is merged here; keys are read only then."""
        return super().acts_between(block) and self.removed[block] > 0

    def match(self, block: int, state: TokenState, attention: AttentionReader) -> Match | None:
        """Pair up tokens and pick the most similar pairs."""
        count = state.layout.longest - state.prefix
        removed = state.to_remove(self.removed[block], lambda n: n // 2)
        present = state.present()
        if removed == 0 or (isinstance(removed, list) and not any(removed)):
            return None
        sources, targets = alternate_split(count, state.prefix % 2 == 0)
        metric = state.after_prefix(attention.key_direction())
        similarity = metric[:, sources] @ metric[:, targets].transpose(1, 2)
        sources_present = targets_present = None
        if present is not None:
            sources_present, targets_present = present[:, sources], present[:, targets]
        value, partner = best_partner(similarity, targets_present)
        if sources_present is not None:
            value = value.masked_fill(~sources_present, float("-inf"))
        merged, stay = Selection.split(value, removed, sources_present)
        # Positions count the whole image: every block merges, and adding the prefix to all of them
        # later takes four more operations.
        place = torch.arange(state.layout.longest, device=value.device).expand(state.batch, -1)
        front, patches = place[:, : state.prefix], place[:, state.prefix :]
        others = Selection(patches[:, targets])
        if targets_present is not None:
            others = Selection.where(targets_present).of(others.index)
        kept = Selection(front).then(stay.of(patches[:, sources]), others)
        into = partner.gather(1, merged.index) + (state.prefix + stay.size)
        return Match(kept, merged.of(patches[:, sources]), into, with_prefix=False)

    def at_level(self, level: float) -> dict[str, Any]:
        """Return r for each block; the first ones remove one more if the total does not divide."""
        assert self.spec is not None
        blocks, patches = len(self.active_blocks), self.spec.grid[0] * self.spec.grid[1]
        r = split_evenly(round(level * min(patches, blocks * (patches // 2))), blocks)
        return {"r": r[0] if r[0] == r[-1] else r}

    def at_counts(self, left: Sequence[int]) -> dict[str, Any] | None:
        """Return r for each block, at most half of its tokens; later blocks remove the rest."""
        assert self.spec is not None
        now, removed = self.spec.grid[0] * self.spec.grid[1], []
        for count in left:
            removed.append(max(0, min(now - count, now // 2)))
            now -= removed[-1]
        while len(removed) > 1 and removed[-1] == 0:
            removed.pop()
        return {"r": tuple(removed), "inflection": 0.0, "blocks": None}
