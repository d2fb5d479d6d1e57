"""Norms by name, and how convolutions and their norms stand together in dense heads."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from foveate.core import check_choice
from foveate.dense.canvas import Canvas

__all__ = ["NORMS", "ConvNorm", "make_norm"]

_MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "layer": LayerNorm2d,
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm2d,
}
NORMS = tuple(_MAKERS)


def make_norm(name: str, channels: int) -> nn.Module:
    """Make a norm over maps.

    "layer" norms the channels of each cell, whatever the batch; "batch" is the usual one, and
    "frozen" is a batch norm that keeps its statistics, for batches of one or two images.
    """
    check_choice("norm", name, NORMS)
    return _MAKERS[name](channels)


class ConvNorm(nn.Module):
    """A convolution, a norm and perhaps an activation, with nothing left outside the images.

    Attributes:
        scale: cells a patch of the map that comes out.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        *,
        scale: float,
        norm: str,
        stride: int = 1,
        act: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.norm = make_norm(norm, out)
        self.act = nn.Identity() if act is None else act()

    def forward(self, values: Tensor, canvas: Canvas) -> Tensor:
        """Turn a map that is clean into another one, ``[B, out, h, w]``."""
        return canvas.clean(self.act(self.norm(self.conv(values))), self.scale)
