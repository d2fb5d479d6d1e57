"""timm ``VisionTransformer``: ViT, DeiT (distilled too), DeiT-III, DINOv2, CLIP, SigLIP, MAE."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from foveate.backbones._timm import TimmBackbone, refuse, spec_of
from foveate.core import Embedded, Heads

__all__ = ["TimmViT"]


class TimmViT(TimmBackbone):
    """Parts of a stock ``VisionTransformer`` or ``VisionTransformerDistilled``."""

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Take every VisionTransformer; the constructor refuses what is not plain."""
        return isinstance(model, VisionTransformer)

    def __init__(self, model: Any) -> None:
        if type(model) not in (VisionTransformer, VisionTransformerDistilled):
            raise refuse(model, "a class of its own")
        for block in model.blocks:
            if type(block) is not Block:
                kind = type(block).__name__
                named = {
                    "ResPostBlock": "post-norm blocks",
                    "ParallelScalingBlock": "parallel blocks",
                    "DiffParallelScalingBlock": "parallel blocks",
                    "ParallelThingsBlock": "parallel blocks",
                }
                raise refuse(model, named.get(kind, f"{kind} blocks"))
            if type(block.attn) is not Attention:
                raise refuse(model, f"{type(block.attn).__name__} attention")
        spec = spec_of(
            "timm VisionTransformer",
            model,
            class_token=model.cls_token is not None,
            rotary=False,
        )
        super().__init__(model, spec)

    def embed(self, images: Tensor) -> Embedded:
        """Patches, prefix tokens, positions, and the norm before the blocks (CLIP)."""
        grid, model = self.grid_of(images), self.model
        x = self._with_prefix(self._patches(images), grid)
        return Embedded(model.norm_pre(model.pos_drop(x)), grid)

    def qkv(self, block: int, x: Tensor, rotary: Tensor | None) -> Heads:
        """One linear layer for all three, then qk-norm where the model has it."""
        stock = self._blocks[block]
        attn = stock.attn
        y = stock.norm1(x)
        q, k, v = attn.qkv(y).view(-1, 3, attn.num_heads, attn.head_dim).unbind(1)
        dropout = attn.attn_drop.p if attn.training else 0.0
        return Heads(attn.q_norm(q), attn.k_norm(k), v, y, attn.scale, dropout)

    def project(self, block: int, out: Tensor, heads: Heads) -> Tensor:
        """Inner norm, gate, projection and LayerScale."""
        stock = self._blocks[block]
        attn = stock.attn
        out = attn.norm(out)
        if attn.gate is not None:
            out = out * attn.gate(heads.y).sigmoid()
        return stock.ls1(attn.proj_drop(attn.proj(out)))

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Norm, MLP and LayerScale."""
        stock = self._blocks[block]
        return stock.ls2(stock.mlp(stock.norm2(x)))

    def key_mean(self, block: int, heads: Heads) -> Tensor | None:
        """One thin product with the head-averaged key weights.

        Not where keys are normed, nor where an adapter or a hook makes them differ from what the
        layer's own weights give.
        """
        attn = self._blocks[block].attn
        hooked = attn.qkv._forward_hooks or attn.qkv._forward_pre_hooks
        if not isinstance(attn.k_norm, nn.Identity) or type(attn.qkv) is not nn.Linear or hooked:
            return None
        shape = (3, attn.num_heads, attn.head_dim)
        weight = attn.qkv.weight.view(*shape, -1)[1].mean(0)  # [d, C]
        bias = None if attn.qkv.bias is None else attn.qkv.bias.view(shape)[1].mean(0)
        return nn.functional.linear(heads.y, weight, bias)
