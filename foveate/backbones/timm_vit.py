"""Drive timm's ``VisionTransformer``: ViT, DeiT, DeiT-III, DINOv2, CLIP, SigLIP and MAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.backbones._shared import check_class, same_modules
from foveate.backbones._timm import TimmBackbone, check_blocks, spec_of
from foveate.core import BackboneSpec, Embedded, Heads

__all__ = ["TimmViT", "plain_vit", "set_block_eps", "vit_arguments"]

_BLOCKS = ("blocks", "early")  # how names of modules that hold blocks end


class TimmViT(TimmBackbone):
    """Parts of a stock ``VisionTransformer`` or ``VisionTransformerDistilled``.

    Attributes:
        stock: the classes of the family.
        stem: the class of their patch embedding.
    """

    family = "timm VisionTransformer"
    stock: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, VisionTransformerDistilled)
    stem: ClassVar[type[PatchEmbed]] = PatchEmbed

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Accept every model of these classes; the constructor refuses what is not plain."""
        return isinstance(model, cls.stock)

    def __init__(self, model: Any) -> None:
        check_class(model, *self.stock)
        check_blocks(model, Block, Attention)
        super().__init__(model, self.read_spec(model))

    def read_spec(self, model: Any) -> BackboneSpec:
        """Read the facts off a model whose blocks have been checked."""
        return spec_of(
            self.family,
            model,
            class_token=model.cls_token is not None,
            rotary=False,
            pools_prefix=model.pool_include_prefix,
            stem=self.stem,
        )

    def recipe(self) -> dict[str, Any] | None:
        """Return arguments of ``timm.create_model`` or ``plain_vit``; None if neither suffices."""
        named = super().recipe()
        if named is not None:
            return named
        arguments = vit_arguments(self.model)
        with torch.device("meta"):
            twin = plain_vit(**arguments, initialise=False)
        return {"plain": arguments} if same_modules(self.model, twin) else None

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any]) -> nn.Module:
        """Make the model by timm's name, or from the arguments of ``plain_vit``."""
        if "plain" not in recipe:
            return super().rebuild(recipe)
        try:
            return plain_vit(**recipe["plain"])
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"the model cannot be made again: {error}") from error

    def embed(self, images: Tensor, edit: Callable[[Tensor], Tensor] | None = None) -> Embedded:
        """Make patches, prefix tokens and positions; apply the norm before the blocks (CLIP).

        ``edit`` may change the patches ``[B, H*W, C]`` before they get their positions.
        """
        grid, model = self.grid_of(images), self.model
        patches = self._patches(images)
        x = self._with_prefix(patches if edit is None else edit(patches), grid)
        return Embedded(model.norm_pre(model.pos_drop(x)), grid)

    def through(
        self, x: Tensor, grid: tuple[int, int], visit: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Run any number of tokens through the blocks; ``visit`` gets each block's result."""
        for block in self._blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if visit is not None:
                visit(x)
        return x

    def attention_input(self, block: int, x: Tensor) -> Tensor:
        """Apply the first norm."""
        return self._blocks[block].norm1(x)

    def qkv(self, block: int, y: Tensor, rotary: Tensor | None) -> Heads:
        """Apply one linear layer for all three, then qk-norm if the model has it."""
        attn = self._blocks[block].attn
        q, k, v = attn.qkv(y).view(-1, 3, attn.num_heads, attn.head_dim).unbind(1)
        dropout = attn.attn_drop.p if attn.training else 0.0
        return Heads(attn.q_norm(q), attn.k_norm(k), v, attn.scale, dropout)

    def project(self, block: int, out: Tensor, y: Tensor) -> Tensor:
        """Apply inner norm, gate and projection."""
        attn = self._blocks[block].attn
        out = attn.norm(out)
        if attn.gate is not None:
            out = out * attn.gate(y).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def scale(self, block: int, out: Tensor) -> Tensor:
        """Apply LayerScale."""
        return self._blocks[block].ls1(out)

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Apply norm, MLP and LayerScale."""
        stock = self._blocks[block]
        return stock.ls2(stock.mlp(stock.norm2(x)))


def plain_vit(
    *,
    distilled: bool = False,
    eps: float = 1e-6,
    block_eps: float | None = None,
    initialise: bool = True,
    **arguments: Any,
) -> VisionTransformer:
    """Make a timm ViT from plain data.

    Args:
        distilled: add a distillation token and its own head.
        eps: epsilon of the layer norms.
        block_eps: epsilon of the norms inside the blocks, if it differs.
        initialise: give the weights timm's first values; without, others will take their place.
        arguments: arguments of timm's ``VisionTransformer``.
    """
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    usual: dict[str, Any] = {} if initialise else {"weight_init": "skip"}
    model = kind(norm_layer=partial(nn.LayerNorm, eps=eps), **usual, **arguments)
    if not initialise:
        model.weight_init_mode = ""  # for calls of its own init_weights
    set_block_eps(model, block_eps)
    return model


def set_block_eps(model: VisionTransformer, eps: float | None) -> None:
    """Change the epsilon of the norms inside a model's blocks; None leaves them."""
    for norm in model.blocks.modules():
        if eps is not None and isinstance(norm, nn.LayerNorm):
            norm.eps = eps


def vit_arguments(model: Any) -> dict[str, Any]:
    """Read from a model's layers the arguments with which ``plain_vit`` makes it again."""
    block, distilled = model.blocks[0], isinstance(model, VisionTransformerDistilled)
    outer = [module for name, module in model.named_children() if not name.endswith(_BLOCKS)]
    norms = [m for part in outer for m in part.modules() if isinstance(m, nn.LayerNorm)]
    eps = norms[-1].eps if norms else block.norm1.eps
    positions = 0 if model.pos_embed is None else model.pos_embed.shape[1]
    scaled = not isinstance(block.ls1, nn.Identity)
    after_pool = not isinstance(model.fc_norm, nn.Identity)
    return {
        "distilled": distilled,
        "eps": eps,  # of the final norm, or the one after pooling
        "block_eps": block.norm1.eps if block.norm1.eps != eps else None,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": 1.0 if scaled else None,
        "class_token": model.cls_token is not None,
        "pos_embed": "learn" if positions else "none",
        "no_embed_class": bool(model.no_embed_class),
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": after_pool or not isinstance(model.norm, nn.Identity),
        "fc_norm": after_pool,
        "pool_include_prefix": bool(model.pool_include_prefix),
        "dynamic_img_size": bool(model.dynamic_img_size),
        "dynamic_img_pad": bool(model.patch_embed.dynamic_img_pad),
    }
