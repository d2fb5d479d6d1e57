"""A feature pyramid network on the maps of a dense backbone, which never sees the padding."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from foveate.core.driver import Watch
from foveate.dense.backbone import DenseBackbone, Features, Hosting, Images
from foveate.dense.canvas import Canvas

__all__ = ["FpnBackbone", "MaskedFpn"]


class MaskedFpn(FeaturePyramidNetwork):
    """torchvision's network, which keeps maps at zero outside the images."""

    def forward(self, x: list[Tensor], canvas: Canvas, scales: tuple[float, ...]) -> list[Tensor]:
        """Combine maps, the finest first."""
        found: list[Tensor] = []
        above: Tensor | None = None
        for n in reversed(range(len(x))):
            inner = self.inner_blocks[n](x[n])
            if above is not None:
                inner = inner + F.interpolate(above, size=inner.shape[-2:], mode="nearest")
            above = canvas.clean(inner, scales[n])
            found.insert(0, canvas.clean(self.layer_blocks[n](above), scales[n]))
        return found


class FpnBackbone(Hosting):
    """A dense backbone with a feature pyramid network, as torchvision's detectors take it.

    Attributes:
        body: the dense backbone.
        out_channels: channels of every map.
        scales: cells per patch of each map; the pooled map is the last.
    """

    inner = "body"

    def __init__(self, body: DenseBackbone, channels: int, *, pooled: bool = True) -> None:
        super().__init__()
        self.body = body
        self.out_channels, self.pooled = channels, pooled
        self.fpn = MaskedFpn([body.out_channels] * len(body.scales), channels)
        self.scales = body.scales + ((body.scales[-1] / 2,) if pooled else ())

    def forward(self, images: Images) -> OrderedDict[str, Tensor]:
        """Return maps of images, named "0", "1", ... and "pool"."""
        return self.features(images).maps

    def features(self, images: Images, watch: Watch | None = None) -> Features:
        """Return maps, canvas and tokens."""
        found = self.body.features(images, watch)
        maps = self.fpn(list(found.maps.values()), found.canvas, self.body.scales)
        named = OrderedDict(zip(found.maps, maps, strict=True))
        if self.pooled:
            named["pool"] = F.max_pool2d(maps[-1], 1, 2)
        return Features(named, found.canvas, found.state)

    def fixed(self, images: Images) -> Features:
        return self.features(images)
