"""ViT-Adapter: a convolutional stem beside the ViT, and an exchange between the two.

Paper: Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023.

The stem makes maps at 1/4, 1/8, 1/16 and 1/32. The last three form one row of tokens, c. Before
each of four groups of blocks an injector adds to the patches what they read from c, and after it an
extractor adds to c what it reads from the patches. Both read by deformable attention. Injectors and
extractors always see every patch: a patch that a method leaves out keeps its last value.

If the side of a patch is not 16 pixels, the stem sees images resized to 16 pixels per patch.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import TokenState, check_choice
from foveate.core.driver import Watch
from foveate.dense.backbone import DenseBackbone
from foveate.dense.canvas import Canvas, as_map, as_tokens
from foveate.dense.deformable import DeformableAttention, Levels, choose_heads
from foveate.dense.layers import ConvNorm, make_norm

__all__ = ["ViTAdapter", "adapter"]

_SCALES = (4.0, 2.0, 1.0, 0.5)  # cells per patch of each map
_C = _SCALES[1:]  # levels of c
_STEM = 16  # pixels per patch that the stem is made for
_EPS = 1e-6


class ViTAdapter(DenseBackbone):
    """A ViT with an adapter around it; see ``adapter`` for the options."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        interactions: int,
        heads: int | None,
        points: int,
        value_ratio: float,
        hidden_ratio: float,
        stem: int,
        extra_extractors: int,
        gamma: float,
        drop_path: float,
        norm: str,
        prefix: str,
        gone: str,
    ) -> None:
        check_choice("prefix", prefix, ("keep", "none"))
        super().__init__(vit, scales=_SCALES, out_channels=None, gone=gone)
        backbone = self.body.backbone
        width, depth = backbone.spec.width, backbone.spec.depth
        if not 1 <= interactions <= depth:
            raise ValueError(f"interactions must lie in 1..{depth} blocks, got {interactions}")
        heads = choose_heads(width, heads, backbone.spec.heads)
        self.prefix = prefix
        self.bounds = [round(n * depth / interactions) for n in range(interactions + 1)]

        def attention(levels: int) -> DeformableAttention:
            return DeformableAttention(
                width, heads=heads, levels=levels, points=points, value_ratio=value_ratio
            )

        def extractor() -> Extractor:
            return Extractor(attention(1), ConvFFN(width, int(width * hidden_ratio)), drop_path)

        self.prior = SpatialPrior(backbone.channels, width, stem, norm)
        self.level_embed = nn.Parameter(torch.randn(len(_C), width))
        self.injectors = nn.ModuleList(
            Injector(attention(len(_C)), gamma) for _ in range(interactions)
        )
        self.extractors = nn.ModuleList(extractor() for _ in range(interactions))
        self.extra_extractors = nn.ModuleList(extractor() for _ in range(extra_extractors))
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norms = nn.ModuleList(make_norm(norm, width) for _ in _SCALES)

    def maps(self, canvas: Canvas, watch: Watch | None) -> tuple[list[Tensor], TokenState]:
        """Run the groups of blocks, with an injector before and an extractor after each."""
        state = self.body.begin(canvas.own(), track=True, prefix=self.prefix == "keep")
        finest, c = self.prior(canvas, self.level_embed)
        of_c, of_vit = Levels.of(canvas, _C), Levels.of(canvas, (1.0,), state.grid)
        x = state.restore(self.gone)
        for n, (injector, extractor) in enumerate(
            zip(self.injectors, self.extractors, strict=True)
        ):
            state = state.add(injector(x, of_vit, c, of_c))
            state = self.blocks(state, self.bounds[n], self.bounds[n + 1], watch)
            x = state.restore(self.gone)
            c = extractor(c, of_c, x, of_vit, canvas)
        for extra in self.extra_extractors:
            c = extra(c, of_c, x, of_vit, canvas)
        coarser = [
            as_map(part, shape)
            for part, shape in zip(c.split(of_c.lengths, 1), of_c.shapes, strict=True)
        ]
        found = [self.up(coarser[0]).add_(finest), *coarser]
        vit = canvas.spread(x, state.grid)
        return [
            canvas.clean(norm(values + _resized(vit, scale)), scale)
            for norm, values, scale in zip(self.norms, found, _SCALES, strict=True)
        ], state

    def no_weight_decay(self) -> set[str]:
        """Exempt the level embeddings too."""
        return super().no_weight_decay() | {"level_embed"}


class SpatialPrior(nn.Module):
    """The convolutional stem: maps at 1/4 to 1/32, all as wide as the ViT."""

    def __init__(self, channels: int, width: int, stem: int, norm: str) -> None:
        super().__init__()

        def conv(inner: int, out: int, stride: int, scale: float) -> ConvNorm:
            return ConvNorm(inner, out, 3, stride=stride, scale=scale, norm=norm, act=nn.ReLU)

        self.stem = nn.ModuleList(
            [conv(channels, stem, 2, 8.0), conv(stem, stem, 1, 8.0), conv(stem, stem, 1, 8.0)]
        )
        self.pool = nn.MaxPool2d(3, 2, 1)  # after a ReLU the zeros of padding are neutral
        widths = (stem, 2 * stem, 4 * stem, 4 * stem)
        self.coarser = nn.ModuleList(
            conv(widths[n], widths[n + 1], 2, scale) for n, scale in enumerate(_C)
        )
        self.project = nn.ModuleList(nn.Conv2d(inner, width, 1) for inner in widths)

    def forward(self, canvas: Canvas, level_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the finest map ``[B, C, h, w]`` and the others as tokens ``[B, S, C]``."""
        # Tokens are maps in memory format channels_last, so nothing is transposed afterwards.
        values = canvas.resized(_STEM).contiguous(memory_format=torch.channels_last)
        for layer in self.stem:
            values = layer(values, canvas)
        values = canvas.clean(self.pool(values), _SCALES[0])
        finest, *project = self.project
        first, tokens = finest(values), []
        for layer, to_width, embed in zip(self.coarser, project, level_embed, strict=True):
            values = layer(values, canvas)
            tokens.append(as_tokens(to_width(values)) + embed)
        return first, torch.cat(tokens, 1)


class Injector(nn.Module):
    """Adds to the patches what they read from the stem's tokens, scaled by ``gamma``."""

    def __init__(self, attention: DeformableAttention, gamma: float) -> None:
        super().__init__()
        width = attention.output_proj.out_features
        self.query_norm = nn.LayerNorm(width, eps=_EPS)
        self.value_norm = nn.LayerNorm(width, eps=_EPS)
        self.attention = attention
        self.gamma = nn.Parameter(torch.full((width,), gamma))

    def forward(self, x: Tensor, of_vit: Levels, c: Tensor, of_c: Levels) -> Tensor:
        """Return what is to be added to the patches, ``[B, H*W, C]``."""
        query, value = self.query_norm(x), self.value_norm(c)
        return self.gamma * self.attention(query, of_vit.positions, value, of_c)


class Extractor(nn.Module):
    """Adds to the stem's tokens what they read from the patches."""

    def __init__(self, attention: DeformableAttention, ffn: ConvFFN, drop_path: float) -> None:
        super().__init__()
        width = attention.output_proj.out_features
        self.query_norm = nn.LayerNorm(width, eps=_EPS)
        self.value_norm = nn.LayerNorm(width, eps=_EPS)
        self.attention = attention
        self.ffn_norm = nn.LayerNorm(width, eps=_EPS)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, c: Tensor, of_c: Levels, x: Tensor, of_vit: Levels, canvas: Canvas) -> Tensor:
        """Return the updated tokens of the stem, ``[B, S, C]``."""
        query, value = self.query_norm(c), self.value_norm(x)
        c = c + self.attention(query, of_c.positions, value, of_vit)
        return c + self.drop_path(self.ffn(self.ffn_norm(c), of_c, canvas))


class ConvFFN(nn.Module):
    """A feed-forward network with a depthwise convolution of each level in its middle."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, c: Tensor, levels: Levels, canvas: Canvas) -> Tensor:
        """Transform tokens ``[B, S, C]``."""
        parts = self.fc1(c).split(levels.lengths, 1)
        mixed = [
            as_tokens(self.conv(canvas.clean(as_map(part, shape), scale)))
            for part, shape, scale in zip(parts, levels.shapes, levels.scales, strict=True)
        ]
        return self.fc2(self.act(torch.cat(mixed, 1)))


def _resized(values: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return values
    return F.interpolate(values, scale_factor=scale, mode="bilinear", align_corners=False)


def adapter(
    vit: nn.Module,
    *,
    interactions: int = 4,
    heads: int | None = None,
    points: int = 4,
    value_ratio: float = 1.0,
    hidden_ratio: float = 0.25,
    stem: int = 64,
    extra_extractors: int = 2,
    gamma: float = 0.0,
    drop_path: float = 0.0,
    norm: str = "batch",
    prefix: str = "keep",
    gone: str = "last",
) -> ViTAdapter:
    """Put ViT-Adapter around a vision transformer, reduced or not: strides 4, 8, 16 and 32.

    Args:
        vit: a plain ViT, or one from ``foveate.apply`` or ``windowed``; its weights are shared.
        interactions: groups of blocks with an injector before and an extractor after each.
        heads: heads of deformable attention; None takes 6, or the ViT's own number where 6 does
            not divide the width.
        points: points that a head reads on each level.
        value_ratio: width of the values in deformable attention, as a share of the ViT's width.
        hidden_ratio: hidden width of the extractors' feed-forward network, as a share of the ViT's
            width.
        stem: channels of the stem's first layers.
        extra_extractors: further extractors after the last block.
        gamma: initial scale of the injectors.
        drop_path: probability that an extractor's feed-forward network is skipped for an image.
        norm: "batch" as in the paper, "layer", or "frozen"; batches of one or two images train
            better with "layer".
        prefix: "keep" runs the ViT's class and register tokens along, which the adapter never
            changes; "none" leaves them out as the paper does.
        gone: value of a patch that the method dropped: its "last" value, or "zero".
    """
    return ViTAdapter(
        vit,
        interactions=interactions,
        heads=heads,
        points=points,
        value_ratio=value_ratio,
        hidden_ratio=hidden_ratio,
        stem=stem,
        extra_extractors=extra_extractors,
        gamma=gamma,
        drop_path=drop_path,
        norm=norm,
        prefix=prefix,
        gone=gone,
    )
