"""MAE: the encoder computes only visible patches, a light decoder predicts the hidden ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.mim.encoders import VisibleEncoder, sincos_positions
from foveate.mim.masks import Hiding, Mask
from foveate.mim.method import Prediction, States, register
from foveate.mim.targets import normalised, patchify, statistics

__all__ = ["Decoder", "Mae", "checked_heads"]


class Decoder(nn.Module):
    """A decoder: visible tokens, a learned token for every hidden one, positions, a few blocks.

    Args:
        encoder_width: width of the tokens that come in.
        width: width of its own tokens.
        depth: number of blocks.
        heads: number of attention heads.
        values: number of values to predict for a patch.
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
    ) -> tuple[Tensor, tuple[States, ...]]:
        """Predict all patches from encoded tokens; return every layer's tokens if asked for."""
        front, patches = self.laid_out(encoded, mask)
        x = torch.cat([front, patches], 1) + self.positions(grid)
        return self.through(x, patches, states=states, checkpointing=checkpointing)

    def laid_out(self, encoded: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Return prefix tokens, and patches in raster order; all hidden ones are the same."""
        x = self.embed(encoded)
        front, seen = x[:, : self.prefix], x[:, self.prefix :]
        assert mask.visible is not None
        patches = self.mask_token.to(x.dtype).expand(len(x), mask.hidden.shape[1], -1)
        return front, patches.scatter(1, mask.visible[..., None].expand_as(seen), seen)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return positions of all tokens, for images of any size."""
        if grid == self.grid:
            return self.pos_embed
        return sincos_positions(grid, self.width, self.prefix, self.pos_embed.device)

    def through(
        self, x: Tensor, initial: Tensor, *context: Tensor, states: bool, checkpointing: bool
    ) -> tuple[Tensor, tuple[States, ...]]:
        """Run the blocks, which may also attend to a context, and predict."""
        layers = [x]
        for block in self.blocks:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
            layers.append(x)
        kept = States([layer[:, self.prefix :] for layer in layers], initial)
        return self.pred(self.norm(x[:, self.prefix :])), (kept,) if states else ()


@register("mae")
class Mae(VisibleEncoder):
    """Masked autoencoder.

    Args:
        vit: the encoder, with absolute positions.
        decoder_width: width of the decoder's tokens.
        decoder_depth: number of blocks of the decoder.
        decoder_heads: number of heads of the decoder; None has heads 32 wide.
        norm_pix: predict patches normalised one by one, which makes better features.
        learned_positions: train the encoder's positions; MAE's are sines and cosines, and stay.
    """

    paper = "He et al., CVPR 2022"
    hiding = Hiding(kind="random", ratio=0.75)

    def __init__(
        self,
        vit: nn.Module,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int | None = None,
        norm_pix: bool = True,
        learned_positions: bool = False,
    ) -> None:
        super().__init__(vit, learned_positions=learned_positions)
        spec = self.backbone.spec
        heads = checked_heads(decoder_width, decoder_depth, decoder_heads)
        if decoder_width % heads:
            raise ValueError(
                f"decoder_width={decoder_width} must be a multiple of its {heads} heads"
            )
        self.norm_pix = norm_pix
        self.decoder = Decoder(
            spec.width, decoder_width, decoder_depth, heads, self.values, spec.grid, spec.prefix
        )

    @property
    def depth(self) -> int:
        """Return the number of blocks of the decoder."""
        return len(self.decoder.blocks)

    def forward(self, images: Tensor, mask: Mask, *, states: bool = False) -> Prediction:
        """Return the mean squared error over hidden patches, under "pixel"."""
        grid, backbone = self._checked(images, mask), self.backbone
        patches, kept = self.decoder(
            self.encode(images, mask),
            mask,
            grid,
            states=states,
            checkpointing=backbone.checkpointing,
        )
        target = patchify(images, backbone.spec.patch)
        if self.norm_pix:
            target = normalised(target)
        error = (patches.float() - target).square().mean(-1)
        loss = (error * mask.hidden).sum() / mask.hidden.sum()
        return Prediction({"pixel": loss}, patches, mask, kept)

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        """Return normed prefix and visible tokens ``[B, prefix + V, C]``."""
        backbone = self.backbone
        x = backbone.through(self.visible(images, mask), backbone.grid_of(images))
        return backbone.norm(x)

    def pixels(self, images: Tensor, patches: Tensor) -> Tensor:
        """Give normalised patches the mean and spread of the true ones."""
        if not self.norm_pix:
            return patches
        mean, spread = statistics(patchify(images, self.backbone.spec.patch))
        return patches * spread + mean


def checked_heads(
    width: int,
    depth: int,
    heads: int | None,
    names: tuple[str, str] = ("decoder_width", "decoder_heads"),
) -> int:
    """Check a decoder's size, and return its heads, by default as many as are 32 wide.

    Args:
        width: width of its tokens.
        depth: number of its blocks.
        heads: number of its heads.
        names: names of the options that width and heads are from, for messages.
    """
    heads = max(1, width // 32) if heads is None else heads
    for name, value in ((names[0], width), ("decoder_depth", depth), (names[1], heads)):
        if value < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    if width % 4:
        raise ValueError(f"{names[0]}={width} must be a multiple of 4, for its positions")
    if heads > width:
        raise ValueError(f"{names[1]}={heads} is more than {names[0]}={width} can be divided into")
    return heads
