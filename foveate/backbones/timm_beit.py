"""Drive timm's ``Beit``, which is BEiT and the ViTs of SimMIM and ConMIM, only with all tokens.

Attention in their blocks has a learned bias for the relative position of each pair of tokens.
Methods that drop tokens do not carry this bias, so no method runs on these models. Pre-training
with mask tokens and fine-tuning work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.backbones._shared import check_class
from foveate.backbones._timm import TimmBackbone, check_blocks, spec_of
from foveate.core import Context, Embedded, TokenState

__all__ = ["SHARED_BIAS", "TABLE", "TimmBeit", "expand_position_bias", "shared_position_bias"]

TABLE = "relative_position_bias_table"
SHARED_BIAS = f"rel_pos_bias.{TABLE}"


class TimmBeit(TimmBackbone):
    """Parts of a stock ``Beit``."""

    family = "timm Beit"
    needs_every_token = (
        "the family has relative position bias, and methods that drop tokens do not carry it"
    )

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Accept every Beit; the constructor refuses what is not stock."""
        return isinstance(model, Beit)

    def __init__(self, model: Any) -> None:
        check_class(model, Beit)
        check_blocks(model, Block, Attention)
        spec = spec_of(self.family, model, class_token=True, rotary=False, pools_prefix=False)
        super().__init__(model, spec)

    @property
    def relative(self) -> bool:
        """Whether attention has a relative position bias, which the blocks may share."""
        return self.model.rel_pos_bias is not None or any(
            block.attn.relative_position_bias_table is not None for block in self._blocks
        )

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Image size that the relative position bias is for; None without such a bias."""
        return tuple(self.model.patch_embed.img_size) if self.relative else None

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return patch rows and columns; a relative position bias allows only the model's own."""
        grid, size = super().grid_of(images), self.fixed_size
        if size is not None and grid != self._own_grid():
            raise ValueError(
                f"this Beit has relative positions for images of {size[0]} x {size[1]}, got "
                f"{images.shape[-2]} x {images.shape[-1]}; its set_input_size((height, width)) "
                "resizes them"
            )
        return grid

    def embed(self, images: Tensor, edit: Callable[[Tensor], Tensor] | None = None) -> Embedded:
        """Make patches, class token, and absolute positions if the model has them.

        ``edit`` may change the patches ``[B, H*W, C]`` before they get their positions.
        """
        grid = self.grid_of(images)
        patches = self._patches(images)
        x = self._with_prefix(patches if edit is None else edit(patches), grid)
        return Embedded(self.model.pos_drop(x), grid)

    def through(
        self, x: Tensor, grid: tuple[int, int], visit: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Run all tokens ``[B, 1 + H*W, C]`` through the blocks; ``visit`` gets each result.

        Without a relative position bias any number of tokens is allowed.
        """
        rows, columns = self._own_grid()
        if self.relative and (tuple(grid) != (rows, columns) or x.shape[1] != 1 + rows * columns):
            raise ValueError(
                f"this Beit has relative positions for {rows} x {columns} patches and a class "
                f"token, got {x.shape[1]} tokens of a {grid[0]} x {grid[1]} grid: leave no patch "
                "out (use SimMIM, or a ViT with absolute positions)"
            )
        shared = None if self.model.rel_pos_bias is None else self.model.rel_pos_bias()
        for block in self._blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, shared_rel_pos_bias=shared, use_reentrant=False)
            else:
                x = block(x, shared_rel_pos_bias=shared)
            if visit is not None:
                visit(x)
        return x

    def whole(self, images: Tensor, depth: int | None = None) -> TokenState:
        """Return the normed tokens of whole images, after all blocks or the first ones."""
        embedded = self.embed(images)
        layers: list[Tensor] = []
        x = self.through(embedded.x, embedded.grid, None if depth is None else layers.append)
        x = self.norm(x if depth is None else layers[depth - 1])
        return TokenState.begin(x, Context(self.spec.prefix, embedded.grid))

    def _own_grid(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.grid_size)


def expand_position_bias(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Give every block a copy of the shared table, as in timm's ``beit_*`` models.

    If a block has a table of its own too, the copy is added to it, as attention adds both.

    Args:
        state: tensors by timm's names, with ``rel_pos_bias.relative_position_bias_table``.
        depth: number of blocks.
    """
    if SHARED_BIAS not in state:
        raise ValueError(f"there is no shared position bias to expand: expected {SHARED_BIAS}")
    expanded = dict(state)
    table = expanded.pop(SHARED_BIAS)
    for block in range(depth):
        key = _key(block)
        expanded[key] = table + expanded[key] if key in expanded else table.clone()
    return expanded


def shared_position_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the equal tables of all blocks by one that they share, as in SimMIM's pre-training.

    Args:
        state: tensors by timm's names, with a table in every block.
    """
    tables = {key: value for key, value in state.items() if key.endswith(f".attn.{TABLE}")}
    if _key(0) not in tables:
        raise ValueError(f"there is no position bias to share: expected {_key(0)}")
    if SHARED_BIAS in state:
        raise ValueError(
            f"the state has {SHARED_BIAS} and tables of the blocks: expected only the tables"
        )
    table = tables[_key(0)]
    for key, value in tables.items():
        if not torch.equal(value, table):
            raise ValueError(
                f"{key} differs from block 0's: blocks whose position bias has been trained apart "
                "cannot share one table"
            )
    return {**{k: v for k, v in state.items() if k not in tables}, SHARED_BIAS: table.clone()}


def _key(block: int) -> str:
    return f"blocks.{block}.attn.{TABLE}"
