"""MAE: the encoder computes visible patches alone, a light decoder fills in the hidden ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.mim.masks import Mask
from foveate.mim.method import (
    MaskedImageModel,
    Prediction,
    States,
    register,
    sincos_positions,
    xavier,
)
from foveate.mim.targets import gathered, normalised, patchify, statistics

__all__ = ["Decoder", "Mae"]


class Decoder(nn.Module):
    """Visible tokens, a learned token for every hidden one, positions, a few blocks.

    Args:
        encoder_width: of the tokens that come in.
        width: of its own tokens.
        depth: blocks.
        heads: of attention.
        values: that are predicted of a patch.
        grid: patch rows and columns of the images it is usually given.
        prefix: tokens in front of the patches.
    """

    pos_embed: Tensor

    def __init__(
        self,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        values: int,
        grid: tuple[int, int],
        prefix: int,
    ) -> None:
        super().__init__()
        self.grid, self.prefix, self.width = grid, prefix, width
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(grid, width, prefix))
        self.blocks = nn.ModuleList(
            Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        self.pred = nn.Linear(width, values)

    def forward(
        self,
        encoded: Tensor,
        mask: Mask,
        grid: tuple[int, int],
        *,
        states: bool = False,
        checkpointing: bool = False,
    ) -> tuple[Tensor, States | None]:
        """From encoded prefix and visible tokens to all patches; and the tokens of every layer."""
        x = self.embed(encoded)
        front, seen = x[:, : self.prefix], x[:, self.prefix :]
        assert mask.visible is not None
        patches = self.mask_token.to(x.dtype).expand(len(x), mask.hidden.shape[1], -1)
        patches = patches.scatter(1, mask.visible[..., None].expand_as(seen), seen)
        places = self.pos_embed
        if grid != self.grid:
            places = sincos_positions(grid, self.width, self.prefix, x.device)
        x = torch.cat([front, patches], 1) + places
        layers = [x]
        for block in self.blocks:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            layers.append(x)
        kept = None
        if states:
            kept = States([layer[:, self.prefix :] for layer in layers], patches)
        return self.pred(self.norm(x[:, self.prefix :])), kept


@register("mae")
class Mae(MaskedImageModel):
    """Masked autoencoder.

    Args:
        vit: the encoder, with absolute positions.
        decoder_width: of the decoder's tokens.
        decoder_depth: blocks of the decoder.
        decoder_heads: None has heads 32 wide.
        norm_pix: predict patches normalised one by one, which makes better features.
        learned_positions: train the encoder's positions; MAE's are sines and cosines, and stay.
    """

    paper = "He et al., CVPR 2022"
    mask_kind = "random"
    mask_ratio = 0.75

    def __init__(
        self,
        vit: nn.Module,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int | None = None,
        norm_pix: bool = True,
        learned_positions: bool = False,
    ) -> None:
        super().__init__(
            vit,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            norm_pix=norm_pix,
            learned_positions=learned_positions,
        )
        spec = self.backbone.spec
        if self.backbone.model.pos_embed is None or self.backbone.needs_every_token:
            raise ValueError(
                f"MAE leaves patches out, which needs absolute positions: this {spec.family} has "
                "none; simmim takes it"
            )
        heads = decoder_heads or max(1, decoder_width // 32)
        for name, value in (("width", decoder_width), ("depth", decoder_depth), ("heads", heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"decoder_{name} must be at least 1, got {value}")
        if decoder_width % heads or decoder_width % 4:
            raise ValueError(
                f"decoder_width={decoder_width} must be a multiple of 4 and of its {heads} heads"
            )
        self.norm_pix = norm_pix
        self.decoder = Decoder(
            spec.width, decoder_width, decoder_depth, heads, self.values, spec.grid, spec.prefix
        )
        self.backbone.model.pos_embed.requires_grad_(learned_positions)

    @property
    def depth(self) -> int:
        """Blocks of the decoder."""
        return len(self.decoder.blocks)

    def forward(self, images: Tensor, mask: Mask, *, states: bool = False) -> Prediction:
        """Mean squared error over hidden patches, under "pixel"."""
        grid = self._checked(images, mask)
        if mask.visible is None:
            raise ValueError("MAE needs masks that hide as many patches in every image")
        backbone = self.backbone
        encoded = self.encode(images, mask)
        patches, kept = self.decoder(
            encoded, mask, grid, states=states, checkpointing=backbone.checkpointing
        )
        target = patchify(images, backbone.spec.patch)
        if self.norm_pix:
            target = normalised(target)
        error = (patches.float() - target).square().mean(-1)
        loss = (error * mask.hidden).sum() / mask.hidden.sum()
        return Prediction({"pixel": loss}, patches, mask, () if kept is None else (kept,))

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        """Normed prefix and visible tokens ``[B, prefix + V, C]``."""
        backbone, prefix = self.backbone, self.backbone.spec.prefix
        embedded = backbone.embed(images)
        assert mask.visible is not None
        seen = gathered(embedded.x[:, prefix:], mask.visible)
        x = torch.cat([embedded.x[:, :prefix], seen], 1)
        return backbone.norm(backbone.through(x, embedded.grid))

    def pixels(self, images: Tensor, patches: Tensor) -> Tensor:
        """Normalised patches are put back with the mean and spread of the true ones."""
        if not self.norm_pix:
            return patches
        mean, spread = statistics(patchify(images, self.backbone.spec.patch))
        return patches * spread + mean

    def initialise(self) -> None:
        """Xavier's, tokens of spread 0.02, sine-cosine positions."""
        xavier(self)
        vit, spec = self.backbone.model, self.backbone.spec
        for token in (
            getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")
        ):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        prefix = vit.pos_embed.shape[1] - spec.grid[0] * spec.grid[1]
        with torch.no_grad():
            vit.pos_embed.copy_(sincos_positions(spec.grid, spec.width, prefix))
