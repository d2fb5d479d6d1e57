"""Semantic segmentation on a vision transformer: a light head, and one like UPerNet's.

Papers: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019 (the light one); Xiao et
al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018 (UPerNet).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import Outcome, check_choice
from foveate.core.losses import of_a_process
from foveate.dense.backbone import DenseBackbone, DenseModel, Features, Images
from foveate.dense.canvas import Canvas, Size
from foveate.dense.detectors import Preparation, as_backbone, check_count, check_images
from foveate.dense.fpn import MaskedFpn
from foveate.dense.labels import classes_of_maps
from foveate.dense.layers import ConvNorm

__all__ = ["Segmenter", "SemanticFpn", "UPerNet", "segmenter"]

_BINS = (1, 2, 3, 6)  # rows and columns that UPerNet pools the coarsest map to


class SemanticFpn(nn.Module):
    """A feature pyramid network whose maps are resized to the finest one's size and summed."""

    def __init__(self, body: DenseBackbone, channels: int, num_classes: int, norm: str) -> None:
        super().__init__()
        self.scales = body.scales
        self.fpn = MaskedFpn([body.out_channels] * len(self.scales), channels)
        half = channels // 2
        self.branches = nn.ModuleList()
        for scale in self.scales:
            steps = max(1, round(math.log2(self.scales[0] / scale)))
            self.branches.append(
                nn.ModuleList(
                    ConvNorm(
                        half if step else channels,
                        half,
                        3,
                        scale=scale * 2**step,
                        norm=norm,
                        act=nn.ReLU,
                    )
                    for step in range(steps)
                )
            )
        self.classify = nn.Conv2d(half, num_classes, 1)

    def forward(self, maps: OrderedDict[str, Tensor], canvas: Canvas) -> Tensor:
        """Return class scores at the finest map's size, ``[B, classes, h, w]``."""
        pyramid = self.fpn(list(maps.values()), canvas, self.scales)
        total: Tensor | None = None
        for values, scale, branch in zip(pyramid, self.scales, self.branches, strict=True):
            for layer in branch:  # type: ignore[attr-defined]
                values = layer(values, canvas)
                if scale < self.scales[0]:
                    values = canvas.enlarge(values, layer.scale, 2)
            total = values if total is None else total + values
        assert total is not None
        return self.classify(total)


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest map, then a feature pyramid whose maps are concatenated."""

    def __init__(self, body: DenseBackbone, channels: int, num_classes: int, norm: str) -> None:
        super().__init__()
        self.scales, width = body.scales, body.out_channels

        def conv(inner: int, kernel: int, scale: float) -> ConvNorm:
            return ConvNorm(inner, channels, kernel, scale=scale, norm=norm, act=nn.ReLU)

        coarsest = self.scales[-1]
        self.pools = nn.ModuleList(conv(width, 1, coarsest) for _ in _BINS)
        self.bottleneck = conv(width + len(_BINS) * channels, 3, coarsest)
        self.lateral = nn.ModuleList(conv(width, 1, scale) for scale in self.scales[:-1])
        self.smooth = nn.ModuleList(conv(channels, 3, scale) for scale in self.scales[:-1])
        self.fuse = conv(len(self.scales) * channels, 3, self.scales[0])
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: OrderedDict[str, Tensor], canvas: Canvas) -> Tensor:
        """Return class scores at the finest map's size, ``[B, classes, h, w]``."""
        *finer, coarsest = maps.values()
        pooled = [
            self._pooled(coarsest, bins, layer, canvas)
            for bins, layer in zip(_BINS, self.pools, strict=True)
        ]
        above = self.bottleneck(torch.cat([coarsest, *pooled], 1), canvas)
        found = [above]
        for n in reversed(range(len(finer))):
            factor = round(self.scales[n] / self.scales[n + 1])
            above = canvas.enlarge(above, self.scales[n + 1], factor)
            above = self.lateral[n](finer[n], canvas) + above
            found.insert(0, self.smooth[n](above, canvas))
        side = [
            canvas.enlarge(values, scale, round(self.scales[0] / scale))
            for values, scale in zip(found, self.scales, strict=True)
        ]
        return self.classify(self.fuse(torch.cat(side, 1), canvas))

    def _pooled(self, values: Tensor, bins: int, layer: nn.Module, canvas: Canvas) -> Tensor:
        """Average each image into ``bins`` x ``bins`` cells, resized to its own part of the map."""
        assert isinstance(layer, ConvNorm)
        scale = self.scales[-1]
        sizes = [(math.ceil(h * scale), math.ceil(w * scale)) for h, w in canvas.grids]
        few = torch.cat(
            [
                F.adaptive_avg_pool2d(values[n : n + 1, :, :h, :w], bins)
                for n, (h, w) in enumerate(sizes)
            ]
        )
        few = layer.act(layer.norm(layer.conv(few)))  # a batch norm sees the whole batch
        out = few.new_zeros(len(values), few.shape[1], *values.shape[-2:])
        for n, (h, w) in enumerate(sizes):
            out[n, :, :h, :w] = F.interpolate(
                few[n : n + 1], (h, w), mode="bilinear", align_corners=False
            )[0]
        return out


_HEADS = {"fpn": SemanticFpn, "upernet": UPerNet}


class Segmenter(DenseModel):
    """A dense backbone with a head that gives a class to each pixel; see ``segmenter``.

    Attributes:
        backbone: the dense backbone.
        head: computes class scores from its maps.
        transform: normalises, resizes and pads images.
        num_classes: number of classes.
        ignore: label of pixels that do not count.
    """

    def __init__(
        self,
        backbone: DenseBackbone,
        head: nn.Module,
        transform: Preparation,
        *,
        num_classes: int,
        ignore: int,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.transform = backbone, head, transform
        self.num_classes, self.ignore = num_classes, ignore
        self.reducer.for_pixels(self.pixel_classes)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor] | list[Tensor]:
        """Return losses in training mode, else a map of labels ``[h, w]`` for each image.

        The losses are the cross entropy, a mean over the pixels of all processes that train
        together, and the method's own weighted ones.

        Args:
            images: images ``[channels, h, w]`` with values from 0 to 1, of any sizes.
            targets: for training, a map of labels ``[h, w]`` for each image.
        """
        return self.run(images, targets)[0]

    def run(
        self, images: Sequence[Tensor], targets: Sequence[Tensor] | None = None
    ) -> tuple[dict[str, Tensor] | list[Tensor], Outcome]:
        """Return what ``forward`` returns, and the outcome of the pass."""
        check_images(images)
        if self.training:
            self._check(images, targets)
        scores, features, sizes = self._scores(images)
        outcome = features.outcome
        if not self.training:
            return [score.argmax(0) for score in scores], outcome
        assert targets is not None
        total, count = scores[0].new_zeros(()), scores[0].new_zeros(())
        for score, labels in zip(scores, targets, strict=True):
            labels = labels.long()
            total = total + F.cross_entropy(
                score[None].float(), labels[None], ignore_index=self.ignore, reduction="sum"
            )
            count = count + (labels != self.ignore).sum()
        losses = {"loss_segment": total / of_a_process(count).clamp_min(1)}
        classes = None
        if self.reducer.pixel_classes:
            grid = outcome.state.context.grid
            classes = classes_of_maps(targets, self.ignore, sizes, features.canvas, grid)
        return {**losses, **self.method_losses(outcome, classes)}, outcome

    def scores(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return class scores ``[classes, h, w]`` of each image."""
        return self._scores(images)[0]

    def fixed(self, images: Images) -> Features:
        found = self.backbone.features(images)
        self.head(found.maps, found.canvas)
        return found

    def _check(self, images: Sequence[Tensor], targets: Sequence[Tensor] | None) -> None:
        check_count("a map of labels", images, targets)
        for number, (image, labels) in enumerate(zip(images, targets or (), strict=True)):
            if labels.shape != image.shape[-2:]:
                raise ValueError(
                    f"the labels of image {number} are {list(labels.shape)}, the image is "
                    f"{list(image.shape[-2:])}"
                )
            outside = (labels < 0) | (labels >= self.num_classes)
            wrong = outside & (labels != self.ignore)
            if bool(wrong.any()):
                raise ValueError(
                    f"labels must lie in 0..{self.num_classes - 1} or be {self.ignore}, which is "
                    f"ignored, got {int(labels[wrong][0])} for image {number}"
                )

    def _scores(self, images: Sequence[Tensor]) -> tuple[list[Tensor], Features, list[Size]]:
        """Return scores, the backbone's features, and the sizes of the prepared images."""
        batch = self.prepared(images)
        found = self.backbone.features(batch)
        scores = self.head(found.maps, found.canvas)
        canvas, scale = found.canvas, self.backbone.scales[0]
        each = []
        for score, image, size, grid in zip(
            scores, images, batch.image_sizes, canvas.grids, strict=True
        ):
            own = score[None, :, : math.ceil(grid[0] * scale), : math.ceil(grid[1] * scale)]
            pixels = [cells * side for cells, side in zip(grid, canvas.patch, strict=True)]
            own = F.interpolate(own, pixels, mode="bilinear", align_corners=False)
            own = own[..., : size[0], : size[1]]
            if own.shape[-2:] != image.shape[-2:]:  # the image was resized
                own = F.interpolate(own, image.shape[-2:], mode="bilinear", align_corners=False)
            each.append(own[0])
        return each, found, batch.image_sizes


def segmenter(
    vit: nn.Module,
    num_classes: int,
    *,
    head: str = "fpn",
    channels: int | None = None,
    norm: str = "layer",
    image_size: tuple[int, int] | None = None,
    ignore: int = 255,
) -> Segmenter:
    """Make a network for semantic segmentation on a vision transformer.

    Args:
        vit: a ViT, plain or reduced, which gets a ViT-Adapter; or a dense backbone.
        num_classes: number of classes; labels count from 0.
        head: "fpn", the light one, or "upernet".
        channels: channels of the head; None is 256 for "fpn" and 512 for "upernet".
        norm: norms of the head: "layer", "batch" or "frozen".
        image_size: length of the shorter side of an image after resizing, and the largest length of
            its longer side; None leaves images as they are.
        ignore: label of pixels that do not count.
    """
    check_choice("head", head, tuple(_HEADS))
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    body = as_backbone(vit)
    if channels is None:
        channels = 256 if head == "fpn" else 512
    return Segmenter(
        body,
        _HEADS[head](body, channels, num_classes, norm),
        Preparation(body, image_size),
        num_classes=num_classes,
        ignore=ignore,
    )
