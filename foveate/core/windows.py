"""Windows: attention inside windows with a few global blocks, as detectors often run dense models.

Papers: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet),
ECCV 2022; Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023.

Windows affect only attention: tokens keep their order, and nothing is padded. Windows at the right
and lower border are smaller if the image ends there. Prefix tokens are keys in every window, and
their own queries see the whole image.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.attention import Heads
from foveate.core.context import Context
from foveate.core.tokens import TokenState

__all__ = ["Windows"]


class Windows:
    """The size of the windows, and the blocks that attend inside them.

    Attributes:
        size: side of a window, in patches.
        every: number of blocks in a group; the last block of each group is global.
        global_blocks: the blocks with global attention.
    """

    def __init__(
        self, size: int = 14, every: int = 3, *, global_blocks: tuple[int, ...] | None = None
    ) -> None:
        for name, value in (("size", size), ("every", every)):
            if value < 1:
                raise ValueError(f"{name} of the windows must be at least 1, got {value}")
        self.size, self.every = size, every
        self._given = global_blocks
        self.global_blocks: frozenset[int] = frozenset(global_blocks or ())

    def build(self, depth: int) -> None:
        """Resolve the global blocks for a model of this depth."""
        if self._given is None:
            self.global_blocks = frozenset(range(self.every - 1, depth, self.every))
        wrong = sorted(block for block in self.global_blocks if not 0 <= block < depth)
        if wrong:
            raise ValueError(f"global_blocks must lie in 0..{depth - 1}, got {wrong[0]}")

    def check(self, method: str, context: Context, *, masked: bool) -> None:
        """Refuse passes in which tokens do not fill the windows."""
        if method != "dense":
            raise ValueError(
                f"{method} cannot run in windows: the tokens that are left do not fill them"
            )
        if masked or context.mode == "masked":
            what = "a keep_mask" if masked else "mode 'masked'"
            raise ValueError(f"windows need whole images: {what} leaves gaps in them")

    def attend(self, heads: Heads, state: TokenState) -> Tensor:
        """Compute the attention output ``[T, H * d]`` of a block with windows."""
        context, layout, prefix = state.context, state.layout, state.prefix
        if context.grids is None:  # all images have the same grid, so they run together
            groups = [(0, state.batch, context.grid)]
        else:
            groups = [(n, 1, grid) for n, grid in enumerate(context.grids)]
        outs = []
        for first, count, grid in groups:
            start = sum(layout.lengths[:first])
            rows = slice(start, start + count * (prefix + grid[0] * grid[1]))
            q, k, v = (t[rows].view(count, -1, *t.shape[1:]) for t in (heads.q, heads.k, heads.v))
            outs.append(self._image(q, k, v, grid, prefix, heads).flatten(0, 1))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)

    def _image(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], prefix: int, heads: Heads
    ) -> Tensor:
        """Attend within images of one grid: all are ``[B, prefix + H*W, heads, d]``."""
        out = torch.empty_like(v)
        if prefix:
            out[:, :prefix] = _softmax(q[:, :prefix], k, v, heads)
        inner = [t[:, prefix:].unflatten(1, grid) for t in (q, k, v, out)]
        for rows in self._bands(grid[0]):
            for columns in self._bands(grid[1]):
                queries, keys, values, place = (
                    self._split(t[:, slice(*rows), slice(*columns)], rows, columns) for t in inner
                )
                shape = place.shape  # [B, windows down, windows across, h, w, heads, d]
                windows = shape[1] * shape[2]
                queries, keys, values = (
                    t.reshape(-1, shape[3] * shape[4], *shape[5:]) for t in (queries, keys, values)
                )
                if prefix:
                    keys = torch.cat([k[:, :prefix].repeat_interleave(windows, 0), keys], 1)
                    values = torch.cat([v[:, :prefix].repeat_interleave(windows, 0), values], 1)
                place.copy_(_softmax(queries, keys, values, heads).view(shape))
        return out

    def _bands(self, length: int) -> list[tuple[int, int]]:
        """Split a side into the part that whole windows fill and the rest."""
        edges = sorted({0, length - length % self.size, length})
        return list(pairwise(edges))

    def _split(self, part: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """View a part ``[B, h, w, heads, d]`` as its windows."""
        down = max(1, (rows[1] - rows[0]) // self.size)
        across = max(1, (columns[1] - columns[0]) // self.size)
        return part.unflatten(2, (across, -1)).unflatten(1, (down, -1)).transpose(2, 3)


def _softmax(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """Attend in batches ``[B, N, heads, d]``."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=heads.dropout,
        scale=heads.scale,
    )
    return out.transpose(1, 2)
