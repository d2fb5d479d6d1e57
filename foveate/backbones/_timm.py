"""Drive timm's ViTs: embedding at any size, pooling and heads, which the families share."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from foveate.backbones._shared import patch_grid, plain_class, refuse, same_modules
from foveate.core import (
    Backbone,
    BackboneSpec,
    TokenState,
    linear_cost,
    pool_mask,
    pool_tokens,
)

__all__ = ["SizedPatches", "TimmBackbone", "check_blocks", "spec_of"]

_log = logging.getLogger(__name__)
# Arguments of ``timm.create_model`` that make it fetch weights or read them from a path.
_READS = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    *("checkpoint_path", "cache_dir"),
}
_POOLS = ("", "avg", "avgmax", "max", "token", "map")
_OTHER_BLOCKS = {
    "ResPostBlock": "post-norm blocks",
    "EvaBlockPostNorm": "post-norm blocks",
    "ParallelScalingBlock": "parallel blocks",
    "DiffParallelScalingBlock": "parallel blocks",
    "ParallelThingsBlock": "parallel blocks",
}


class TimmBackbone(Backbone):
    """Parts that ``VisionTransformer`` and ``Eva`` share; ``Beit`` has most of them."""

    def bind(self, model: nn.Module) -> None:
        """Keep the blocks in a list: indexing a module container in every step is slow."""
        super().bind(model)
        self._blocks: list[Any] = list(self.model.blocks)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model's own blocks."""
        return self._blocks

    def attention_of(self, block: int) -> nn.Module:
        """Return a block's attention."""
        return self._blocks[block].attn

    @property
    def channels(self) -> int:
        """Channels that the patch projection takes."""
        return int(self.model.patch_embed.proj.in_channels)

    def recipe(self) -> dict[str, Any] | None:
        """Return arguments of ``timm.create_model``; None if they cannot make it again."""
        model = self.model
        name = getattr(model, "pretrained_cfg", {}).get("architecture")
        if not name:
            return None
        arguments = {
            **getattr(model, "_model_args", {}),
            # These may have changed since the model was made.
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
            "img_size": list(model.patch_embed.img_size),
        }
        try:
            json.dumps(arguments)
            with torch.device("meta"):
                twin = timm.create_model(name, pretrained=False, **arguments)
        except (TypeError, RuntimeError, ValueError) as error:
            _log.warning("the model cannot be made again from its name %s: %s", name, error)
            return None
        return {"timm": name, "arguments": arguments} if same_modules(model, twin) else None

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any]) -> nn.Module:
        """Make a model by timm's name for it; nothing is downloaded."""
        name, arguments = recipe["timm"], recipe["arguments"]
        # A name with a prefix would make timm fetch or read files: only its own names are allowed.
        if not isinstance(name, str) or not timm.is_model(name):
            raise ValueError(f"this version of timm does not know the model {name!r}")
        if foreign := sorted(_READS & set(arguments)):
            raise ValueError(
                f"{name} cannot be made again with arguments that load weights: "
                f"{', '.join(foreign)}"
            )
        try:
            return timm.create_model(name, pretrained=False, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{name} cannot be made again: {error}") from error

    def current(self) -> bool:
        """Tell whether head, pooling, size and blocks are still the same."""
        model, spec = self.model, self.spec
        return (
            model.num_classes == spec.classes
            and self._pools() == spec.pools_patches
            and tuple(model.patch_embed.grid_size) == spec.grid
            and list(model.blocks) == self._blocks
        )

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return patch rows and columns; refuse images that the patch does not divide."""
        embed = self.model.patch_embed
        if embed.dynamic_img_pad:
            return tuple(embed.dynamic_feat_size(tuple(images.shape[-2:])))
        return patch_grid(images, self.spec.patch)

    def _patches(self, images: Tensor) -> Tensor:
        """Embed patches ``[B, H*W, C]`` at any size, even if the model itself insists on one."""
        embed = self.model.patch_embed
        if isinstance(embed, SizedPatches):
            return embed.patches(images)
        if embed.dynamic_img_pad:
            return embed(images).reshape(images.shape[0], -1, self.spec.width)
        return embed.norm(embed.proj(images).flatten(2).transpose(1, 2))

    def _with_prefix(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Put prefix tokens in front and add absolute positions, resized to the grid."""
        model, batch = self.model, patches.shape[0]
        front = [
            token.expand(batch, -1, -1)
            for name in ("cls_token", "dist_token", "reg_token")
            if (token := getattr(model, name, None)) is not None
        ]
        pos, covers_prefix = model.pos_embed, not getattr(model, "no_embed_class", False)
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
        """Return timm's DropPath of a branch; None where its rate is zero."""
        stock = self._blocks[block]
        module = stock.drop_path2 if branch else stock.drop_path1
        return None if isinstance(module, nn.Identity) else module

    def norm(self, x: Tensor) -> Tensor:
        """Apply the norm after the last block (Identity where the model norms after pooling)."""
        return self.model.norm(x)

    def head(self, state: TokenState) -> Tensor:
        """Pool the tokens that are left, as the model does, and classify."""
        model, how = self.model, self.model.global_pool
        if how == "token":
            return model.forward_head(state.prefix_tokens())
        if how == "":
            if not state.layout.is_even:
                raise ValueError(
                    "this model returns un-pooled tokens, and the images kept different numbers of "
                    "them: use forward_features(images), or recall_before='head' without a "
                    "keep_mask"
                )
            pooled = state.tokens()
        elif getattr(model, "attn_pool", None) is not None:
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

    def _pools(self) -> bool:
        """Return whether the head reads patch tokens."""
        return self.model.global_pool != "token"

    def _pools_prefix(self) -> bool:
        return bool(getattr(self.model, "pool_include_prefix", False))


class SizedPatches(PatchEmbed):
    """Base of our own patch embeddings: ``forward`` takes one image size, ``patches`` takes any.

    Attributes:
        whose: name of the model in messages.
    """

    whose: ClassVar[str]

    def patches(self, images: Tensor) -> Tensor:
        """Make patches ``[B, N, C]`` of images of any size that the patch divides."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Make patches of images of the model's own size."""
        if tuple(images.shape[-2:]) != tuple(self.img_size):
            raise ValueError(
                f"this {self.whose} takes images of {self.img_size[0]} x {self.img_size[1]}, got "
                f"{images.shape[-2]} x {images.shape[-1]}; call set_input_size first"
            )
        return self.patches(images)


def check_blocks(model: Any, block: type[nn.Module], *attention: type[nn.Module]) -> None:
    """Refuse a model unless its blocks and their attention have these classes of timm."""
    for one in model.blocks:
        if plain_class(one) is not block:
            kind = type(one).__name__
            raise refuse(model, _OTHER_BLOCKS.get(kind, f"{kind} blocks"))
        if plain_class(one.attn) not in attention:
            raise refuse(model, f"{type(one.attn).__name__} attention")


def spec_of(
    family: str,
    model: Any,
    *,
    class_token: bool,
    rotary: bool,
    pools_prefix: bool,
    stem: type[PatchEmbed] = PatchEmbed,
) -> BackboneSpec:
    """Read the facts off a timm model whose blocks have been checked."""
    if type(model.patch_embed) is not stem:
        raise refuse(model, f"a {type(model.patch_embed).__name__} patch embedding")
    if model.patch_embed.grid_size is None:
        raise refuse(model, "a patch embedding without an image size")
    if model.global_pool not in _POOLS:
        raise refuse(model, f"{model.global_pool!r} pooling")
    if getattr(model, "patch_drop", None) is not None and not isinstance(
        model.patch_drop, nn.Identity
    ):
        raise refuse(model, "patch dropout")
    first, blocks = model.blocks[0].attn, list(model.blocks)
    patch = tuple(model.patch_embed.patch_size)
    head_cost = linear_cost(model.head, getattr(model, "head_dist", None))
    pool, pool_cost = getattr(model, "attn_pool", None), 0
    if pool is not None:
        pool_cost = linear_cost(pool.kv) + 2 * pool.latent_len * model.embed_dim
        head_cost += pool.latent_len * linear_cost(pool.q, pool.proj, pool.mlp)
        head_cost += model.num_prefix_tokens * pool_cost if pools_prefix else 0
    return BackboneSpec(
        family=family,
        width=model.embed_dim,
        depth=len(blocks),
        heads=first.num_heads,
        head_dim=getattr(first, "head_dim", model.embed_dim // first.num_heads),
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
        head_cost=head_cost,
        pool_cost=pool_cost,
    )
