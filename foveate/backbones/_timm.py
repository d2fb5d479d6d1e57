"""What timm's plain ViT families share: embedding at any size, pooling and head."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from foveate.core import Backbone, BackboneSpec, TokenState, pool_mask, pool_tokens

__all__ = ["TimmBackbone", "linear_cost", "refuse", "spec_of"]

_POOLS = ("", "avg", "avgmax", "max", "token", "map")


class TimmBackbone(Backbone):
    """Parts common to ``VisionTransformer`` and ``Eva``."""

    def bind(self, model: nn.Module) -> None:
        """Keep the blocks in a list: indexing a module container in every step is slow."""
        super().bind(model)
        self._blocks: list[Any] = list(self.model.blocks)

    def current(self) -> bool:
        """Nobody has given the model another head, pooling, size or other blocks since."""
        model, spec = self.model, self.spec
        return (
            model.num_classes == spec.classes
            and (model.global_pool != "token") == spec.pools_patches
            and tuple(model.patch_embed.grid_size) == spec.grid
            and list(model.blocks) == self._blocks
        )

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patch rows and columns; an image that the patch does not divide is refused."""
        embed = self.model.patch_embed
        sizes, patch = images.shape[-2:], self.spec.patch
        if embed.dynamic_img_pad:
            return tuple(embed.dynamic_feat_size(tuple(sizes)))
        for name, size, side in zip(("height", "width"), sizes, patch, strict=True):
            if size % side or size == 0:
                raise ValueError(
                    f"image {name} {size} is not a multiple of the patch's {side}; "
                    f"the nearest that are: {max(1, size // side) * side} and "
                    f"{(size // side + 1) * side}"
                )
        return sizes[0] // patch[0], sizes[1] // patch[1]

    def _patches(self, images: Tensor) -> Tensor:
        """Patch embeddings ``[B, H*W, C]`` at any size, also where the model insists on one."""
        embed = self.model.patch_embed
        if embed.dynamic_img_pad:
            return embed(images).reshape(images.shape[0], -1, self.spec.width)
        return embed.norm(embed.proj(images).flatten(2).transpose(1, 2))

    def _with_prefix(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Prefix tokens in front and absolute positions added, resized to the grid."""
        model, batch = self.model, patches.shape[0]
        front = [
            token.expand(batch, -1, -1)
            for token in (model.cls_token, getattr(model, "dist_token", None), model.reg_token)
            if token is not None
        ]
        pos, covers_prefix = model.pos_embed, not model.no_embed_class
        if pos is not None and grid != tuple(model.patch_embed.grid_size):
            pos = resample_abs_pos_embed(
                pos,
                new_size=list(grid),
                old_size=list(model.patch_embed.grid_size),
                num_prefix_tokens=self.spec.prefix if covers_prefix else 0,
            )
        if pos is not None and not covers_prefix:
            patches = patches + pos
        x = torch.cat([*front, patches], 1) if front else patches
        return x + pos if pos is not None and covers_prefix else x

    def drop_path(self, block: int, branch: int) -> nn.Module | None:
        """Timm's DropPath of a branch; None where its rate is zero."""
        stock = self._blocks[block]
        module = stock.drop_path2 if branch else stock.drop_path1
        return None if isinstance(module, nn.Identity) else module

    def norm(self, x: Tensor) -> Tensor:
        """The norm after the last block (Identity where the model norms after pooling)."""
        return self.model.norm(x)

    def head(self, state: TokenState) -> Tensor:
        """Pool as the model does, over the tokens that are left, and classify."""
        model, how = self.model, self.model.global_pool
        if how == "token":
            return model.forward_head(state.prefix_tokens())
        if how == "":
            if not state.layout.is_even:
                raise ValueError(
                    "this model returns un-pooled tokens, and images kept different counts: use "
                    "forward_features(images).restore(), or preserve=True"
                )
            pooled = state.tokens()
        elif model.attn_pool is not None:
            skip = 0 if self._pools_prefix() else state.prefix
            mask = pool_mask(state)
            mask = None if mask is None else mask[..., skip:]
            if mask is not None:
                # Attention over no token at all is NaN; such an image attends to its padding.
                mask = mask | ~mask.any(-1, keepdim=True)
                if not model.attn_pool.fused_attn:
                    mask = torch.zeros_like(mask, dtype=state.x.dtype).masked_fill(
                        ~mask, float("-inf")
                    )
            pooled = model.attn_pool(state.tokens()[:, skip:], attn_mask=mask)
        else:
            pooled = pool_tokens(state, how, include_prefix=self._pools_prefix())
        return model.head(model.head_drop(model.fc_norm(pooled)))

    def _pools_prefix(self) -> bool:
        return bool(getattr(self.model, "pool_include_prefix", False))


def refuse(model: nn.Module, what: str) -> ValueError:
    """The error for a model that cannot be driven: names it and says what can."""
    return ValueError(
        f"{type(model).__name__} with {what} cannot be driven. Supported are plain pre-norm "
        "vision transformers with global attention: timm VisionTransformer (ViT, DeiT, DeiT-III, "
        "DINOv2, CLIP, SigLIP, MAE) and timm Eva (EVA-02, DINOv3, rotary ViTs)"
    )


def linear_cost(*modules: nn.Module | None) -> int:
    """Multiply-adds per token of all linear layers in some modules."""
    return sum(
        layer.in_features * layer.out_features
        for module in modules
        if module is not None
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    )


def spec_of(family: str, model: Any, *, class_token: bool, rotary: bool) -> BackboneSpec:
    """Read the facts off a timm model whose blocks have been checked."""
    if type(model.patch_embed) is not PatchEmbed:
        raise refuse(model, f"a {type(model.patch_embed).__name__} patch embedding")
    if model.patch_embed.grid_size is None:
        raise refuse(model, "a patch embedding without a size of its own")
    if model.global_pool not in _POOLS:
        raise refuse(model, f"{model.global_pool!r} pooling")
    if getattr(model, "patch_drop", None) is not None and not isinstance(
        model.patch_drop, nn.Identity
    ):
        raise refuse(model, "patch dropout")
    first, blocks = model.blocks[0].attn, list(model.blocks)
    patch = tuple(model.patch_embed.patch_size)
    heads = [getattr(model, name, None) for name in ("head", "head_dist", "attn_pool")]
    return BackboneSpec(
        family=family,
        width=model.embed_dim,
        depth=len(blocks),
        heads=first.num_heads,
        head_dim=first.head_dim,
        prefix=model.num_prefix_tokens,
        class_token=class_token,
        patch=patch,
        grid=tuple(model.patch_embed.grid_size),
        classes=model.num_classes,
        rotary=rotary,
        pools_patches=model.global_pool != "token",
        qkv_cost=tuple(linear_cost(block.attn) for block in blocks),
        mlp_cost=tuple(linear_cost(block.mlp) for block in blocks),
        embed_cost=model.patch_embed.proj.weight.numel(),
        head_cost=linear_cost(*heads),
    )
