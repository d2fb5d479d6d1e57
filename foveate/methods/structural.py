"""Structural: average 2 x 2 neighbouring patches once. A control that ignores content.

Paper: a baseline of Rao et al., "DynamicViT", NeurIPS 2021 (structural downsampling after the
sixth block).

Nothing is scored: after one block every 2 x 2 cell of the grid becomes its mean. Odd grids have
smaller cells at the far edges. Training: recommended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import BackboneSpec, Reducer, Selection, TokenState
from foveate.registry import register

__all__ = ["Structural"]


@register("structural")
@dataclass(eq=False, kw_only=True, repr=False)
class Structural(Reducer):
    """Pools the patch grid 2 x 2 after a given block.

    Attributes:
        after_block: the block after which to pool; None means half of the depth (the sixth of 12).
    """

    after_block: int | None = None

    paper: ClassVar[str] = "baseline of Rao et al., DynamicViT, NeurIPS 2021"
    summary: ClassVar[str] = "averages 2 x 2 neighbouring patches after one block (control)"
    hooks: ClassVar[tuple[str, ...]] = ("after",)
    training_need: ClassVar[str] = "recommended"
    merges: ClassVar[bool] = True
    needs_place: ClassVar[bool] = True

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the block."""
        super().build(spec)
        block = max(0, spec.depth // 2 - 1) if self.after_block is None else self.after_block
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < spec.depth:
            raise ValueError(f"after_block must lie in 0..{spec.depth - 1}, got {block!r}")
        self.active_blocks = (block,)

    def after(self, block: int, state: TokenState) -> TokenState:
        """Keep the first token of each cell and merge the others into it."""
        if block not in self.active_blocks:
            return state
        assert state.place is not None
        columns = state.grid[1]
        place = state.after_prefix(state.place, state.patches)  # [B, N]
        width = -(-columns // 2)
        cells = -(-state.grid[0] // 2) * width
        position = torch.arange(place.shape[1], device=place.device).expand_as(place)
        patch = place < state.patches
        cell = (place // columns // 2) * width + place % columns // 2
        cell = torch.where(patch, cell, cells)
        # Find the first token of every cell; a spare cell takes the tokens that are not patches.
        first = position.new_full((place.shape[0], cells + 1), place.shape[1])
        first = first.scatter_reduce(1, cell, position, "amin")[:, :cells]
        if state.layout.is_even and place.shape[1] == state.patches:
            # The whole grid: as many tokens as cells stay, at a static size.
            kept = Selection(first)
            merged = kept.complement(state.patches)
            into = cell.gather(1, merged.index)
        else:
            occupied = first < place.shape[1]
            others = state.layout.valid(place.device)
            others = ~patch if others is None else ~patch & others[:, state.prefix :]
            first = first.clamp_max(place.shape[1] - 1)  # cells without a token are not read
            kept = Selection.where(occupied).of(first).then(Selection.where(others))
            merged = kept.complement(place.shape[1], patch)
            number = occupied.cumsum(1) - 1  # number of each cell among the occupied ones
            into = number.gather(1, cell.gather(1, merged.index).clamp_max(cells - 1))
        return state.merge(kept, merged, into, torch.ones(place.shape, device=place.device))
