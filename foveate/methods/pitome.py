"""PiToMe: merge tokens that resemble many others and protect the distinctive ones.

Paper: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging",
NeurIPS 2024.

Scored: a token's energy is the mean of ``f(cosine to every token)`` over head-averaged keys.
``f(c) = c`` from a margin on and ``alpha * (exp(c - margin) - 1)`` below it. The margin falls
linearly with depth. A high energy means that a token is redundant.

Matched: of P patch tokens, ``k = floor(P - P * keep)`` go in each block. The 2k of highest energy
can merge, and the others are protected. Every second rank of the 2k merges into its most similar
token of the ranks between, by a mean weighted with the patches each stands for. Attention then
weighs every key by its size (proportional attention). Prefix tokens are never merged.

Training: none needed; the paper also trains with it. No gradient flows through the matching.

The released code differs from the paper. Its last version has ``f(c) = c - margin`` from the
margin on. Its DeiT models of 12 blocks start from a margin of 0.75 and protect no token in the
first six: ``pitome(energy="elu", margin=0.75, unprotected=[0, 1, 2, 3, 4, 5])``. In those blocks
the k most similar pairs of all tokens merge. These settings were read off copies of the release.
It is not known which version made the paper's tables or at which rates, and no accuracy was
reproduced here. Deviation: the release protects the class token alone, here every prefix token.

Which tokens merge depends on ranks of energies, and rounding decides where two energies nearly tie.
Logits may therefore differ by about 1e-3 between devices or batch sizes, while those of other
methods agree to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import (
    AttentionReader,
    BackboneSpec,
    Match,
    MatchReducer,
    Schedule,
    Selection,
    TokenState,
    check_choice,
)
from foveate.ops import best_partner, highest_first
from foveate.registry import register

__all__ = ["PiToMe"]


@register("pitome")
@dataclass(eq=False, kw_only=True, repr=False)
class PiToMe(MatchReducer):
    """Energy-based protection and size-weighted merging.

    Attributes:
        keep: share of the current patch tokens that each block leaves, or one share for each block.
        margin: similarity from which two tokens count as alike in block 0. It falls linearly, to
            ``margin / depth`` in the last block.
        alpha: weight of the similarities below the margin.
        energy: how similarities from the margin on count: as they are ("paper"), or minus the
            margin ("elu", as in the release).
        unprotected: blocks in which every token can merge; only the order of energies is used.
    """

    keep: float | tuple[float, ...] = 0.925
    margin: float = 0.9
    alpha: float = 1.0
    energy: str = "paper"
    unprotected: tuple[int, ...] = ()

    paper: ClassVar[str] = "Tran et al., PiToMe, NeurIPS 2024"
    summary: ClassVar[str] = "merges tokens that resemble many others, protects distinctive ones"
    reads: ClassVar[frozenset[str]] = frozenset({"key_direction"})
    rate: ClassVar[str] = "keep"
    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0}

    def validate(self) -> None:
        """Refuse rates that pairwise merging cannot reach, and other numbers out of range."""
        super().validate()
        for keep in self.keep if isinstance(self.keep, Sequence) else (self.keep,):
            if not 0.5 <= keep <= 1:
                raise ValueError(f"keep must lie in [0.5, 1], since pairs merge; got {keep!r}")
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin must lie in [-1, 1], got {self.margin!r}")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number of at least 0, got {self.alpha!r}")
        check_choice("energy", self.energy, ("paper", "elu"))

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the blocks and the share that each of them keeps."""
        super().build(spec)
        self.schedule = Schedule(self.active_blocks, self.keep, "current", "ceil")
        for block in self.unprotected:
            if block not in self.active_blocks:
                raise ValueError(
                    f"unprotected must name blocks that merge, {list(self.active_blocks)}, "
                    f"got {block}"
                )

    def acts_between(self, block: int) -> bool:
        """Tell whether anything is merged here; keys are read only then."""
        return super().acts_between(block) and self.schedule.rate(self._stage(block)) < 1

    def _stage(self, block: int) -> int:
        return self.active_blocks.index(block)

    def match(self, block: int, state: TokenState, attention: AttentionReader) -> Match | None:
        """Rank tokens by energy, protect those of low energy and pair up those of high energy."""
        removed, mergeable = self._counts(block, state)
        if removed == 0 or (isinstance(removed, list) and not any(removed)):
            return None
        keys = state.after_prefix(attention.key_direction())
        similarity = (keys @ keys.transpose(1, 2)).float()  # [B, P, P]
        present = state.present()
        energy = self._energy(block, similarity, present)
        order = highest_first(energy)
        sources, targets = _ranks(order, 0, mergeable), _ranks(order, 1, mergeable)
        links = similarity.gather(1, sources.index[..., None].expand(-1, -1, order.shape[1]))
        links = links.gather(2, targets.index[:, None].expand(-1, links.shape[1], -1))
        value, partner = best_partner(links, targets.valid)
        merged = sources
        if block in self.unprotected:
            valid = sources.valid
            value = value if valid is None else value.masked_fill(~valid, float("-inf"))
            best = Selection.best(value, removed)
            partner, merged = partner.gather(1, best.index), best.of(sources.index)
        stay = merged.then(targets).complement(order.shape[1], present)
        return Match(stay.then(targets), merged, stay.size + partner)

    def _counts(self, block: int, state: TokenState) -> tuple[int | list[int], int | list[int]]:
        """Count the tokens that go and those that can; lists where images differ."""

        def of(count: int) -> tuple[int, int]:
            removed = count - self.schedule.count(self._stage(block), count, count)
            every = block in self.unprotected and removed > 0
            return removed, count if every else 2 * removed

        if state.layout.is_even:
            return of(state.layout.longest - state.prefix)
        removed, mergeable = zip(*map(of, state.counts), strict=True)
        return list(removed), list(mergeable)

    def _energy(self, block: int, similarity: Tensor, present: Tensor | None) -> Tensor:
        """Return the energy of every token, ``[B, P]``; it is -inf where there is no token.

        The paper divides by the number of tokens, which does not change the ranking in an image.
        """
        assert self.spec is not None
        margin = self.margin * (1 - block / self.spec.depth)
        above = similarity if self.energy == "paper" else similarity - margin
        below = self.alpha * torch.expm1(similarity - margin)
        felt = torch.where(similarity >= margin, above, below)
        if present is None:
            return felt.sum(2)
        return (felt * present[:, None]).sum(2).masked_fill(~present, float("-inf"))

    def at_level(self, level: float) -> dict[str, Any]:
        """Return 1 at level 0, and 0.5, the most that pairs can merge, at level 1."""
        return {"keep": 1 - level / 2}

    def at_counts(self, left: Sequence[int]) -> dict[str, Any] | None:
        """Return for each block the share that leaves this number of patches, at least half."""
        assert self.spec is not None
        now, shares = self.spec.grid[0] * self.spec.grid[1], []
        for count in left:
            count = max(min(count, now), (now + 1) // 2)
            # Counts are rounded up, so the share lies just below the exact one.
            shares.append(max(0.5, math.floor(count / now * 1e4) / 1e4))
            now = count
        return {"keep": tuple(shares), "blocks": None}


def _ranks(order: Tensor, first: int, stop: int | list[int]) -> Selection:
    """Select every second rank below ``stop`` from ``order [B, P]``, each image's tokens by rank.

    ``stop`` is one number for all images or one for each.
    """
    if isinstance(stop, int):
        return Selection(order[:, first:stop:2])
    lengths = tuple(len(range(first, n, 2)) for n in stop)
    return Selection(order[:, first : max(stop) : 2], lengths)
