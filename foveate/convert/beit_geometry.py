"""Infer the size and form of a BEiT, or of a ViT that SimMIM pre-trained, from its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit, gen_relative_position_index
from torch import Tensor, nn

from foveate.backbones import expand_position_bias
from foveate.backbones.timm_beit import SHARED_BIAS, TABLE
from foveate.convert.geometry import Geometry, Grid
from foveate.convert.read import Checkpoint

__all__ = ["BeitGeometry"]

_OWN_BIAS = f"blocks.0.attn.{TABLE}"
_FC_NORM = "fc_norm.weight"
_CLASS_ROWS = 3  # class token to patch, patch to class token, class token to itself


class BeitGeometry(Geometry):
    """The size and form of a ``Beit``, inferred from its tensors.

    Args:
        checkpoint: the file that holds the tensors; notes are added to it.
        state: the tensors by their names in timm.
        expand: whether every block gets a copy of a table that the blocks share.
    """

    def __init__(
        self, checkpoint: Checkpoint, state: Mapping[str, Tensor], expand: bool = False
    ) -> None:
        super().__init__(checkpoint, state)
        self.expand = expand and SHARED_BIAS in state

    def positions(self, wanted: Grid | None) -> tuple[Grid | None, int]:
        """Return the grid of the relative positions, or of absolute ones if there are no others."""
        key = self._table()
        if key is None:
            return super().positions(wanted)
        count = self._shape(key, 2)[0] - _CLASS_ROWS
        side = (math.isqrt(max(0, count)) + 1) // 2
        for grid in (self._saved_grid(), (side, side), wanted):
            if grid is not None and (2 * grid[0] - 1) * (2 * grid[1] - 1) == count:
                break
        else:
            raise ValueError(
                f"{self.path} has {count + _CLASS_ROWS} relative positions, which fit no square "
                "grid: n x n patches have (2n - 1)^2 + 3; give the image size that they are for "
                "as image_size=(height, width)"
            )
        if "pos_embed" in self.state:
            found, patches = self._shape("pos_embed", 3)[1], grid[0] * grid[1]
            if found != patches + 1:
                raise ValueError(
                    f"{self.path} has {found} absolute positions, but relative ones for "
                    f"{grid[0]} x {grid[1]} patches; expected {patches + 1}"
                )
        return grid, 1

    def with_positions(self, grid: Grid, antialias: bool) -> dict[str, Tensor]:
        """Return the tensors with positions for a grid, their tables resized and expanded."""
        state = super().with_positions(grid, antialias)
        tables = [key for key in state if key.endswith(TABLE)]
        stored, _ = self.positions(grid)
        if tables and stored is not None and stored != grid:
            if stored[0] != stored[1]:  # some supported versions of timm do not resize those
                raise ValueError(
                    f"{self.path} has relative positions for {stored[0]} x {stored[1]} patches, "
                    "and only square grids are resized; leave image_size out"
                )
            self.notes.append(
                f"relative positions resized from {stored[0]} x {stored[1]} to {grid[0]} x "
                f"{grid[1]} patches, as timm does"
            )
            rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + _CLASS_ROWS
            for key in tables:
                shape = (rows, self._shape(key, 2)[1])
                state[key] = resize_rel_pos_bias_table(state[key], grid, shape)
        if self.expand:
            self.notes.append("shared position bias copied to every block")
            state = expand_position_bias(state, self._depth())
        return state

    def _table(self) -> str | None:
        return next((key for key in (SHARED_BIAS, _OWN_BIAS) if key in self.state), None)

    def _heads(self, width: int, given: int | None) -> int:
        key = self._table()
        if key is None:
            return super()._heads(width, given)
        heads = self._shape(key, 2)[1]
        if given not in (None, heads) or width % heads:
            said = "" if given is None else f" and num_heads={given!r}"
            raise ValueError(
                f"{self.path} has {key} for {heads} heads, width {width}{said}; expected a number "
                "of heads that divides the width, the same everywhere"
            )
        return heads

    def _make(self, arguments: dict[str, Any], front: int, special: Mapping[str, Any]) -> nn.Module:
        """Make a Beit whose norm stands where the tensors have it.

        By default timm averages the patches and applies the norm afterwards. Pre-trained encoders
        have a norm over all tokens instead, and then the head reads the class token.
        """
        has = self.state.keys()
        model = Beit(
            **arguments,
            global_pool=self._pool(("avg", "token"), "avg" if _FC_NORM in has else "token"),
            use_fc_norm=_FC_NORM in has,
            qkv_bias="blocks.0.attn.q_bias" in has,
            scale_mlp="blocks.0.mlp.norm.weight" in has,
            init_values=1.0 if "blocks.0.gamma_1" in has else None,
            use_abs_pos_emb="pos_embed" in has,
            use_rel_pos_bias=_OWN_BIAS in has or self.expand,
            use_shared_rel_pos_bias=SHARED_BIAS in has and not self.expand,
        )
        # Buffers that files do not hold would stay on the meta device, without values.
        part: Any
        for part in model.modules():
            if getattr(part, "k_bias", None) is not None:
                part.k_bias = torch.zeros(part.k_bias.shape, device="cpu")
            if getattr(part, "relative_position_index", None) is not None:
                index = gen_relative_position_index(part.window_size, device="cpu")
                part.relative_position_index = index
        return model
