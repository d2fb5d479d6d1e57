"""BootMAE: MAE that predicts pixels and, beside them, the features of its own slow copy.

Dong et al., "Bootstrapped Masked Autoencoders for Vision BERT Pretraining", ECCV 2022. The encoder
computes visible patches alone. Two regressors predict the hidden ones and also attend to the
encoder: the pixel regressor to its first tokens, the feature regressor to its last ones, so that
its output need not carry either. The slow copy sees the whole image.

Different from the release: the random shift of its patch order, by which up to three patches of a
block become visible, is left out; the pixel regressor has heads 32 wide (the release has 12 of 42,
which ``decoder_heads=12`` makes); the pixel head has a bias for each value, not each channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.mim.encoders import VisibleEncoder
from foveate.mim.mae import Decoder, checked_heads
from foveate.mim.masks import Hiding, Mask
from foveate.mim.method import Prediction, States, register
from foveate.mim.targets import patchify
from foveate.mim.teacher import TaughtModel, check_momentum

__all__ = ["BootMAE", "Regressor", "emphasis"]

_EPS = 1e-5  # of a patch's variance
_norm: Any = partial(nn.LayerNorm, eps=1e-6)
# Shares of the run: the momentum reaches its second value, its third, and features full weight.
_SECOND, _THIRD, _GROWN = 1 / 8, 1 / 2, 1 / 4


class _Attention(nn.Module):
    """Multi-head attention to a context, without a bias of keys, which would change nothing."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * (width // heads)  # narrower than the width where heads do not divide it
        self.q = nn.Linear(width, inner)
        self.k = nn.Linear(context, inner, bias=False)
        self.v = nn.Linear(context, inner)
        self.proj = nn.Linear(inner, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(x), self.k(context), self.v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Attention among the tokens, then to the encoder's tokens, then a feed forward."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = _norm(width), _Attention(width, width, heads)
        self.norm3, self.norm4 = _norm(width), _norm(context)
        self.cross = _Attention(width, context, heads)
        self.norm2, self.mlp = _norm(width), Mlp(width, 4 * width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y)
        x = x + self.cross(self.norm3(x), self.norm4(context))
        return x + self.mlp(self.norm2(x))


class Regressor(Decoder):
    """A decoder that also attends to a layer of the encoder; only hidden tokens get positions."""

    def __init__(
        self, encoder_width: int, width: int, depth: int, heads: int, *others: Any
    ) -> None:
        super().__init__(encoder_width, width, 0, heads, *others)
        self.blocks = nn.ModuleList(_Block(width, encoder_width, heads) for _ in range(depth))

    def forward(  # type: ignore[override]
        self,
        encoded: Tensor,
        context: Tensor,
        mask: Mask,
        grid: tuple[int, int],
        *,
        states: bool = False,
        checkpointing: bool = False,
    ) -> tuple[Tensor, tuple[States, ...]]:
        """Predict all patches from the encoder's output and its tokens ``[B, prefix + V, C]``."""
        front, patches = self.laid_out(encoded, mask)
        places = self.positions(grid)[:, self.prefix :] * mask.hidden[..., None]
        x = torch.cat([front, patches + places], 1)
        return self.through(x, patches, context, states=states, checkpointing=checkpointing)


@register("bootmae")
class BootMAE(VisibleEncoder, TaughtModel):
    """Bootstrapped masked autoencoder.

    Args:
        vit: the encoder, with absolute positions and at least two blocks.
        decoder_width: width of the pixel regressor's tokens; features have the encoder's width.
        decoder_depth: number of blocks of each regressor.
        decoder_heads: number of heads of the pixel regressor; None has heads 32 wide.
        feature_heads: number of heads of the feature regressor; None has as many as the encoder.
        momentum: of the teacher at the start, after an eighth of the run and from its half on,
            linear in between; ViT-L ends with 0.9999.
        learned_positions: train the encoder's positions; the paper's are sines and cosines.
    """

    paper = "Dong et al., ECCV 2022"
    hiding = Hiding(kind="block", ratio=0.75, blocks=120 / 147)
    token_std = 1e-6

    def __init__(
        self,
        vit: nn.Module,
        decoder_width: int = 512,
        decoder_depth: int = 2,
        decoder_heads: int | None = None,
        feature_heads: int | None = None,
        momentum: Sequence[float] = (0.999, 0.9999, 0.99999),
        learned_positions: bool = False,
    ) -> None:
        super().__init__(vit, learned_positions=learned_positions)
        spec = self.backbone.spec
        if spec.depth < 2:
            raise ValueError(
                "bootmae reads shallow features after the first block and deep ones after the "
                f"last, and an encoder of {spec.depth} block has no two: make it deeper"
            )
        if not isinstance(momentum, (list, tuple)) or len(momentum) != 3:
            raise ValueError(f"momentum of bootmae is three numbers, got {momentum!r}")
        check_momentum(*momentum)
        self.momentum = tuple(momentum)
        heads = checked_heads(decoder_width, decoder_depth, decoder_heads)
        more = checked_heads(
            spec.width,
            decoder_depth,
            spec.heads if feature_heads is None else feature_heads,
            ("the encoder's width", "feature_heads"),
        )
        self.pixel, self.feature = (
            Regressor(spec.width, width, decoder_depth, number, values, spec.grid, spec.prefix)
            for width, number, values in (
                (decoder_width, heads, self.values),
                (spec.width, more, spec.width),
            )
        )

    @property
    def depth(self) -> int:
        """Return the number of blocks of each regressor."""
        return len(self.pixel.blocks)

    def forward(
        self, images: Tensor, mask: Mask, *, target: Tensor | None = None, states: bool = False
    ) -> Prediction:
        """Return squared errors over hidden patches, "pixel" and "feature"; see ``TaughtModel``."""
        grid, backbone = self._checked(images, mask), self.backbone
        layers: list[Tensor] = []
        encoded = backbone.norm(backbone.through(self.visible(images, mask), grid, layers.append))
        how = {"states": states, "checkpointing": backbone.checkpointing}
        patches, shallow = self.pixel(encoded, layers[0], mask, grid, **how)
        features, deep = self.feature(encoded, layers[-1], mask, grid, **how)
        target = self.target(images) if target is None else target
        pixels = patchify(images, backbone.spec.patch)
        mean, spread = _statistics(pixels, backbone.channels)
        errors = {
            "pixel": patches.float() - (pixels - mean) / spread,
            "feature": _plain(features) - _plain(target),
        }
        weight = emphasis(mask.hidden, grid)
        losses = {
            name: (weight * error.square().mean(-1)).sum() / mask.hidden.sum()
            for name, error in errors.items()
        }
        return Prediction(losses, patches, mask, shallow + deep)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Return the last block's tokens of all patches ``[B, N, C]``, before the final norm."""
        embedded = self.backbone.embed(images)
        x = self.backbone.through(embedded.x, embedded.grid)
        return x[:, self.backbone.spec.prefix :]

    def momentum_at(self, progress: float, epochs: int) -> float:
        """Return one value for each epoch, as in the release, with knots at 100 and 400 of 800."""
        share = _epoch(progress, epochs) / epochs
        first, second, third = self.momentum
        if share < _SECOND:
            return first + share / _SECOND * (second - first)
        return second + min(1.0, (share - _SECOND) / (_THIRD - _SECOND)) * (third - second)

    def weights_at(self, progress: float, epochs: int) -> dict[str, float]:
        """Increase the weight of features from epoch to epoch, over a quarter of the run."""
        return {"feature": min(1.0, (_epoch(progress, epochs) + 1) / epochs / _GROWN)}

    def slow_copy(self) -> TaughtModel:
        """Copy only the encoder."""
        copied = super().slow_copy()
        for part in ("pixel", "feature"):  # a copy of a copy has them no more
            copied._modules.pop(part, None)
        return copied

    def pixels(self, images: Tensor, patches: Tensor) -> Tensor:
        """Give normalised patches the means and spreads of the true ones."""
        true = patchify(images, self.backbone.spec.patch)
        mean, spread = _statistics(true, self.backbone.channels)
        return patches * spread + mean


def emphasis(hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the weight of each patch ``[B, N]``: 0 if visible, up to 2 among hidden ones.

    The mean over a patch and its neighbours counts places outside the image as visible.
    """
    mask = hidden.float().view(-1, 1, *grid)
    return (mask + mask * F.avg_pool2d(mask, 3, stride=1, padding=1)).flatten(1)


def _statistics(patches: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and spread of each channel of a patch, expanded to the patches (unlike MAE)."""
    split = patches.unflatten(-1, (-1, channels))
    mean = split.mean(-2, keepdim=True)
    spread = (split.var(-2, unbiased=False, keepdim=True) + _EPS).sqrt()
    return mean.expand_as(split).flatten(-2), spread.expand_as(split).flatten(-2)


def _plain(features: Tensor) -> Tensor:
    return F.layer_norm(features.float(), features.shape[-1:], eps=1e-6)


def _epoch(progress: float, epochs: int) -> int:
    """Return the epoch, from 0, of a share of the run, tolerating rounding errors."""
    return min(int(progress * epochs + 1e-6), epochs - 1)
