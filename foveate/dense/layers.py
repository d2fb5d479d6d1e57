"""Norms by name, and a convolution with its norm, for dense heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
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

    "layer" normalises the channels of each cell, independently of the batch; "batch" is the usual
    batch norm, and "frozen" one with fixed statistics, for batches of one or two images.
    """
    check_choice("norm", name, NORMS)
    return _MAKERS[name](channels)


class ConvNorm(nn.Module):
    """A convolution, a norm and perhaps an activation; the result is zero outside the images.

    Attributes:
        scale: cells per patch of the resulting map.
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
        act: type[nn.ReLU] | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.norm = make_norm(norm, out)
        self.act = nn.Identity() if act is None else act(inplace=True)

    def forward(self, values: Tensor, canvas: Canvas) -> Tensor:
        """Turn a map that is zero outside the images into another one, ``[B, out, h, w]``."""
        return canvas.clean(self.act(self._normed(values)), self.scale)

    def _normed(self, values: Tensor) -> Tensor:
        norm: Any = self.norm
        settled = isinstance(norm, nn.BatchNorm2d) and not norm.training
        if not (settled or isinstance(norm, FrozenBatchNorm2d)):
            return norm(self.conv(values))
        # With fixed statistics a batch norm is a factor on the weights and a bias; folding it
        # into the convolution saves a pass over the map.
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * factor
        weight = self.conv.weight * factor[:, None, None, None]
        stride, padding = self.conv.stride[0], self.conv.kernel_size[0] // 2
        return F.conv2d(values, weight, bias, stride, padding)
