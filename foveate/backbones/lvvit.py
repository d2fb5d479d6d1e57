"""Make and drive LV-ViT, a deep, narrow ViT with a convolutional stem and a head on every patch.

Paper: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
NeurIPS 2021. The DynamicViT and Token Mergence papers use this model, and no library has it.

Differences from a ViT: four convolutions make the patches, the MLP is three times as wide as the
tokens, queries, keys and values have no bias, and every residual branch is halved. ``head`` reads
the class token and ``aux_head`` each patch (token labelling); the prediction is the class logits
plus half of the largest auxiliary logit of each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foveate.backbones._shared import same_modules
from foveate.backbones._timm import SizedPatches
from foveate.backbones.timm_vit import TimmViT
from foveate.core import BackboneSpec, TokenState, pool_mask

__all__ = ["LVViT", "LVViTBackbone", "lvvit_m", "lvvit_s"]

_AUX_WEIGHT = 0.5


class Stem(SizedPatches):
    """Applies three convolutions at half the resolution, then one that makes the patches."""

    whose = "LV-ViT"

    def __init__(self, *, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__(
            patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, bias=True, **options
        )
        side = patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.proj = nn.Conv2d(64, embed_dim, side, stride=side)

    def patches(self, images: Tensor) -> Tensor:
        """Make patches ``[B, H*W, C]`` of images of any size that the patch divides."""
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)

    def cost(self) -> int:
        """Count the multiply-adds per patch."""
        inside = self.proj.kernel_size[0] ** 2  # cells of the convolutions' grid in one patch
        convs = sum(conv.weight.numel() for conv in (self.conv1, self.conv2, self.conv3))
        return inside * convs + self.proj.weight.numel()


class Half(nn.Module):
    """Halves a residual branch."""

    def forward(self, x: Tensor) -> Tensor:
        """Return half of ``x``."""
        return x * 0.5


class LVViT(VisionTransformer):
    """LV-ViT of any size, on timm's plain blocks, with timm's interface.

    Args:
        img_size: input size. ``set_input_size`` changes it, and ``foveate.apply`` takes any size.
        patch_size: side of a patch in pixels, an even number.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP divided by the width of the tokens.
        num_classes: number of outputs of both heads; 0 leaves them out.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of the last block; earlier ones have less.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        if patch_size % 2:
            raise ValueError(f"patch_size must be even, as the stem halves it, got {patch_size}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            drop_path_rate=drop_path_rate,
            embed_layer=_stem,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
        for block in self.blocks:
            block.ls1, block.ls2 = Half(), Half()
        self.aux_head = self._new_aux_head(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones with this number of outputs."""
        if global_pool not in (None, "token"):
            raise ValueError(
                f"LV-ViT reads its class token: global_pool must be 'token', got {global_pool!r}"
            )
        super().reset_classifier(num_classes)
        like = next(self.blocks.parameters())
        aux_head = self._new_aux_head(num_classes).to(like.device, like.dtype)
        self.aux_head = aux_head.train(self.training)

    def _new_aux_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward_labels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the class token ``[B, K]`` and of every patch ``[B, N, K]``."""
        x = self.forward_features(images)
        return self.head(x[:, 0]), self.aux_head(x[:, self.num_prefix_tokens :])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return class logits plus half of the largest auxiliary logits, from normed tokens."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        return self.predict(x[:, 0], x[:, self.num_prefix_tokens :])

    def predict(self, token: Tensor, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict from a class token ``[B, C]`` and patches ``[B, N, C]``.

        ``mask [B, N]`` says which patches count. If none does, only the class logits are returned.
        """
        aux = self.aux_head(patches)
        if mask is not None:
            aux = aux.masked_fill(~mask[..., None], float("-inf"))
        best = aux.amax(1)
        if mask is not None:
            best = torch.where(mask.any(1, keepdim=True), best, torch.zeros_like(best))
        return self.head(token) + _AUX_WEIGHT * best


def _stem(**options: Any) -> Stem:
    """Make the stem without the arguments of timm's patch embedding that it does not have."""
    for name in ("bias", "device", "dtype"):
        options.pop(name, None)
    return Stem(**options)


def lvvit_s(**options: Any) -> LVViT:
    """Make an untrained LV-ViT-S, 26.2 million parameters; options are those of ``LVViT``."""
    return LVViT(**{"embed_dim": 384, "depth": 16, "num_heads": 6, **options})


def lvvit_m(**options: Any) -> LVViT:
    """Make an untrained LV-ViT-M, 55.8 million parameters; options are those of ``LVViT``."""
    return LVViT(**{"embed_dim": 512, "depth": 20, "num_heads": 8, **options})


class LVViTBackbone(TimmViT):
    """Parts of an LV-ViT; its blocks are timm's."""

    family = "LV-ViT"
    stock = (LVViT,)
    stem = Stem

    def read_spec(self, model: Any) -> BackboneSpec:
        """Read the facts off a model; its auxiliary head reads the patches."""
        return replace(
            super().read_spec(model),
            pools_patches=bool(model.num_classes),
            embed_cost=model.patch_embed.cost(),
            pool_cost=model.embed_dim * model.num_classes,
        )

    @property
    def channels(self) -> int:
        """Channels that the first convolution takes."""
        return int(self.model.patch_embed.conv1.in_channels)

    def _pools(self) -> bool:
        return bool(self.model.num_classes)

    def head(self, state: TokenState) -> Tensor:
        """Apply both heads, the auxiliary one to the patches that are left."""
        model, token = self.model, state.prefix_tokens()[:, 0]
        if not model.num_classes:
            return token
        mask = pool_mask(state)
        if mask is not None:
            mask = mask[:, 0, 0, state.prefix :]
        return model.predict(token, state.tokens()[:, state.prefix :], mask)

    def recipe(self) -> dict[str, Any] | None:
        """Return the arguments of ``LVViT``; None if they cannot make it again."""
        model = self.model
        arguments = {
            "img_size": list(model.patch_embed.img_size),
            "patch_size": model.patch_embed.patch_size[0],
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": self.spec.heads,
            "mlp_ratio": model.blocks[0].mlp.fc1.out_features / model.embed_dim,
            "num_classes": model.num_classes,
            "in_chans": self.channels,
        }
        with torch.device("meta"):
            twin = LVViT(**arguments)
        return {"lvvit": arguments} if same_modules(model, twin) else None

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any]) -> nn.Module:
        """Make the model from the arguments of ``LVViT``."""
        try:
            return LVViT(**recipe["lvvit"])
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"the LV-ViT cannot be made again: {error}") from error
