"""ViTDet's simple feature pyramid: every map is made from the last tokens alone.

Paper: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from foveate.core import TokenState
from foveate.core.driver import Watch
from foveate.dense.backbone import DenseBackbone
from foveate.dense.canvas import Canvas
from foveate.dense.layers import ConvNorm, make_norm

__all__ = ["SimplePyramid", "pyramid"]


class SimplePyramid(DenseBackbone):
    """Makes finer and coarser maps from the last one, by transposed and strided convolutions."""

    def __init__(
        self, vit: nn.Module, *, scales: Sequence[float], channels: int, norm: str, gone: str
    ) -> None:
        for scale in scales:
            if scale <= 0 or not math.log2(scale).is_integer():
                raise ValueError(
                    f"scales must be powers of two (4, 2, 1, 0.5 cells per patch), got {scale}"
                )
        if not scales or list(scales) != sorted(scales, reverse=True):
            raise ValueError(f"scales must descend from the finest map on, got {list(scales)}")
        super().__init__(vit, scales=scales, out_channels=channels, gone=gone)
        width = self.body.backbone.spec.width
        self.levels = nn.ModuleList(_Level(width, channels, scale, norm) for scale in self.scales)

    def maps(self, canvas: Canvas, watch: Watch | None) -> tuple[list[Tensor], TokenState]:
        """Run all blocks, put the patches back on the grid and resize them."""
        state = self.body.begin(canvas.own(), track=True)
        state = self.blocks(state, 0, self.body.backbone.spec.depth, watch)
        last = canvas.spread(state.restore(self.gone), state.grid)
        return [level(last, canvas) for level in self.levels], state


class _Level(nn.Module):
    """Makes one map of the pyramid: resizes, then applies a 1 x 1 and a 3 x 3 convolution."""

    def __init__(self, width: int, channels: int, scale: float, norm: str) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for step in range(abs(int(math.log2(scale)))):
            if scale > 1:
                steps += [make_norm(norm, width), nn.GELU()] if step else []
                steps.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
                width //= 2
            else:  # its 2 x 2 windows do not overlap, so nothing crosses a border
                steps.append(nn.Conv2d(width, width, 2, 2))
        self.resize = nn.Sequential(*steps)
        self.narrow = ConvNorm(width, channels, 1, scale=scale, norm=norm)
        self.smooth = ConvNorm(channels, channels, 3, scale=scale, norm=norm)

    def forward(self, values: Tensor, canvas: Canvas) -> Tensor:
        return self.smooth(self.narrow(self.resize(values), canvas), canvas)


def pyramid(
    vit: nn.Module,
    *,
    scales: Sequence[float] = (4, 2, 1, 0.5),
    channels: int = 256,
    norm: str = "layer",
    gone: str = "last",
) -> SimplePyramid:
    """Put ViTDet's simple feature pyramid on a vision transformer, reduced or not.

    Args:
        vit: a plain ViT, or one from ``foveate.apply`` or ``windowed``; its weights are shared.
        scales: cells per patch of each map: powers of two, the finest map first. With patches of 16
            pixels, 4, 2, 1 and 0.5 are strides 4, 8, 16 and 32.
        channels: channels of every map.
        norm: "layer" as in the paper, "batch" or "frozen".
        gone: value of a patch that the method dropped: its "last" value, or "zero".
    """
    return SimplePyramid(vit, scales=scales, channels=channels, norm=norm, gone=gone)
