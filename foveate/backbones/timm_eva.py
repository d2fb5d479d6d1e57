"""Drive timm's ``Eva``: EVA-02, DINOv3 and the rotary ViTs, whose positions follow their tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.backbones._shared import check_class
from foveate.backbones._timm import TimmBackbone, check_blocks, spec_of
from foveate.core import Embedded, Heads

__all__ = ["TimmEva"]


class TimmEva(TimmBackbone):
    """Parts of a stock ``Eva``."""

    family = "timm Eva"

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Accept every Eva; the constructor refuses what is not plain."""
        return isinstance(model, Eva)

    def __init__(self, model: Any) -> None:
        check_class(model, Eva)
        check_blocks(model, EvaBlock, EvaAttention, AttentionRope)
        spec = spec_of(
            self.family,
            model,
            class_token=model.cls_token is not None,
            rotary=model.rope is not None,
            pools_prefix=model.attn_pool is not None,
        )
        super().__init__(model, spec)

    def embed(self, images: Tensor) -> Embedded:
        """Make patches, prefix tokens, absolute positions, and the table of rotary ones."""
        grid, model = self.grid_of(images), self.model
        x = model.pos_drop(self._with_prefix(self._patches(images), grid))
        return Embedded(model.norm_pre(x), grid, self._table(grid))

    def _table(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the sines and cosines of every patch, and a last row that rotates nothing."""
        rope = self.model.rope
        if rope is None:
            return None
        if getattr(rope, "_use_cached_embed", False):
            if tuple(rope.feat_shape) != grid:
                # This kind keeps one grid and ignores the shape it is asked for; a copy is
                # moved to the new grid so that the model's own stays as it was.
                rope = copy.deepcopy(rope)
                rope.update_feat_shape(list(grid))
            table = rope.get_embed()
        else:
            table = rope.get_embed(shape=list(grid))
        still = torch.zeros_like(table[..., :1, :])
        still[..., table.shape[-1] // 2 :] = 1.0
        table = torch.cat([table, still], -2)
        if table.ndim == 4:  # one table for each block and head: [depth, H, P + 1, 2d]
            return table.transpose(1, 2)
        return table[:, None]  # [P + 1, 1, 2d]

    def attention_input(self, block: int, x: Tensor) -> Tensor:
        """Apply the first norm."""
        return self._blocks[block].norm1(x)

    def qkv(self, block: int, y: Tensor, rotary: Tensor | None) -> Heads:
        """Apply fused or separate projections, qk-norm and rotation; repeat grouped keys."""
        attn = self._blocks[block].attn
        if attn.qkv is not None:
            q, k, v = self._fused(attn, y).view(-1, 3, attn.num_heads, attn.head_dim).unbind(1)
        else:
            q, k, v = (
                proj(y).unflatten(-1, (-1, attn.head_dim)).flatten(0, -3)
                for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rotary is not None:
            half = bool(getattr(attn, "rotate_half", False))
            q = apply_rot_embed_cat(q, rotary, half=half).type_as(v)
            k = apply_rot_embed_cat(k, rotary, half=half).type_as(v)
        groups = getattr(attn, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        dropout = attn.attn_drop.p if attn.training else 0.0
        return Heads(q, k, v, attn.scale, dropout)

    @staticmethod
    def _fused(attn: Any, y: Tensor) -> Tensor:
        if getattr(attn, "q_bias", None) is None:
            return attn.qkv(y)
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate:
            return attn.qkv(y) + bias
        return F.linear(y, attn.qkv.weight, bias)

    def project(self, block: int, out: Tensor, y: Tensor) -> Tensor:
        """Apply inner norm, gate and projection."""
        attn = self._blocks[block].attn
        out = attn.norm(out)
        if attn.gate is not None:
            out = out * attn.gate(y).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def scale(self, block: int, out: Tensor) -> Tensor:
        """Apply LayerScale."""
        gamma = self._blocks[block].gamma_1
        return out if gamma is None else gamma * out

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Apply norm, MLP and LayerScale."""
        stock = self._blocks[block]
        out = stock.mlp(stock.norm2(x))
        return out if stock.gamma_2 is None else stock.gamma_2 * out

    def _pools_prefix(self) -> bool:
        return self.model.attn_pool is not None  # this family's attention pooling reads all tokens
