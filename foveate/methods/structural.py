"""Structural: average 2 x 2 neighbouring patches once. The control without any content.

Paper: a baseline of Rao et al., "DynamicViT", NeurIPS 2021 (structural downsampling after the
sixth block).

Nothing is scored: after one block every 2 x 2 cell of the grid becomes its mean. Odd grids have
smaller cells at the far edges. Training: recommended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import BackboneSpec, Match, MatchReducer, Seen, TokenState
from foveate.registry import register

__all__ = ["Structural"]


@register("structural")
@dataclass(eq=False, kw_only=True, repr=False)
class Structural(MatchReducer):
    """2 x 2 average pooling of the patch grid after a given block.

    Attributes:
        after_block: the block after which to pool; None means half of the depth (the sixth of 12).
    """

    after_block: int | None = None

    paper: ClassVar[str] = "baseline of Rao et al., DynamicViT, NeurIPS 2021"
    summary: ClassVar[str] = "averages 2 x 2 neighbouring patches after one block (control)"
    hooks: ClassVar[tuple[str, ...]] = ("after",)
    training_need: ClassVar[str] = "recommended"
    needs_place: ClassVar[bool] = True

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the block."""
        super().build(spec)
        block = max(0, spec.depth // 2 - 1) if self.after_block is None else self.after_block
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < spec.depth:
            raise ValueError(f"after_block must lie in 0..{spec.depth - 1}, got {block!r}")
        self.acts = (block,)

    def after(self, block: int, state: TokenState) -> TokenState:
        """Pool once."""
        return self.merge(block, state, None) if block in self.acts else state

    def match(self, block: int, state: TokenState, seen: Seen | None) -> Match | None:
        """The first token of a cell stays and takes up the others."""
        assert state.place is not None
        rows, columns = state.grid
        place = state.after_prefix(state.place, state.patches)  # [B, N]
        cells = -(-rows // 2) * -(-columns // 2)
        cell = (place // columns // 2) * -(-columns // 2) + place % columns // 2
        batch, count = place.shape
        if state.layout.is_even and count == state.patches:
            return self._whole_grid(state, cell, cells)
        # Some patches are missing: cells differ from image to image.
        present = place < state.patches
        cell = torch.where(present, cell, cells)
        position = torch.arange(count, device=place.device).expand(batch, -1)
        first = position.new_full((batch, cells + 1), count)
        first = first.scatter_reduce(1, cell, position, "amin")[:, :cells]
        occupied = first < count
        slot = occupied.cumsum(1) - 1
        slot = torch.cat([slot, slot.new_zeros(batch, 1)], 1)
        stays = present & (
            position == torch.cat([first, first.new_full((batch, 1), -1)], 1).gather(1, cell)
        )
        # Tokens without a place (fused, package) stay as they are, behind the cells.
        valid = state.layout.valid(place.device)
        other = ~present if valid is None else ~present & valid[:, state.prefix :]
        keep_key = torch.where(stays, cell, torch.where(other, cells + position, 2 * cells + count))
        order = keep_key.argsort(1)
        number = (stays | other).sum(1)
        idx_keep = order[:, : int(number.max())]
        valid_keep = torch.arange(idx_keep.shape[1], device=place.device) < number[:, None]
        merged = present & ~stays
        idx_src = (
            (~merged)
            .to(torch.uint8)
            .sort(dim=1, stable=True)
            .indices[:, : int(merged.sum(1).max())]
        )
        valid_src = torch.arange(idx_src.shape[1], device=place.device) < merged.sum(1)[:, None]
        into = slot.gather(1, cell.gather(1, idx_src)).clamp_min(0)
        into = torch.where(valid_src, into, torch.zeros_like(into))
        weight = torch.ones(batch, count, device=place.device)
        return Match(idx_keep, idx_src, into, weight, valid_keep, valid_src)

    def _whole_grid(self, state: TokenState, cell: Tensor, cells: int) -> Match:
        """The common case, at a static size: every cell is complete and in order."""
        rows, columns = state.grid
        batch, device = state.batch, cell.device
        index = torch.arange(state.patches, device=device).view(rows, columns)
        # The grid may stand in any order after an earlier method; place says where each is.
        assert state.place is not None
        place = state.after_prefix(state.place)
        where = torch.empty_like(place).scatter(
            1, place, torch.arange(state.patches, device=device).expand_as(place)
        )
        keep, src = index[::2, ::2].flatten(), self._others(index)
        idx_keep, idx_src = where[:, keep], where[:, src]
        into = cell.gather(1, idx_src)
        weight = torch.ones(batch, state.patches, device=device)
        return Match(idx_keep, idx_src, into, weight)

    @staticmethod
    def _others(index: Tensor) -> Tensor:
        return torch.cat([index[::2, 1::2].flatten(), index[1::2, :].flatten()])

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """A quarter of the grid, rounded up on odd sides."""
        if hook != "after" or block not in self.acts:
            return current
        rows, columns = grid
        cells = -(-rows // 2) * -(-columns // 2)
        return cells if current == rows * columns else min(current, cells)
