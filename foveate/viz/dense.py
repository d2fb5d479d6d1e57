"""Run dense models on pictures, and find the patches that objects cover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.v2.functional import pil_to_tensor

from foveate.core import Trace
from foveate.dense import Hosting
from foveate.dense.detectors import Preparation
from foveate.viz.grid import Box

__all__ = ["covered", "trace_dense", "trace_pixels"]

_PLACES = 16  # on each side of a patch, where ``covered`` looks for objects


def trace_dense(model: Hosting, picture: Image.Image) -> tuple[Trace, Box]:
    """Trace one image; return the trace and the box that its patches cover, in pixels."""
    grey = model.reduced.backbone.channels == 1
    trace, (height, width) = trace_pixels(
        model, pil_to_tensor(picture.convert("L") if grey else picture)
    )
    return trace, (0.0, 0.0, width, height)


@torch.no_grad()
def trace_pixels(model: Hosting, image: Tensor) -> tuple[Trace, tuple[float, float]]:
    """Prepare one image, uint8 ``[channels, H, W]``, as the model does, and trace it.

    Returns:
        The trace, and the height and width that its patches cover, in pixels of the image. They are
        a little larger than the image if the patch does not divide its size.
    """
    like = next(model.parameters())
    pixels = image.to(like.device).to(like.dtype) / 255
    # A dense backbone takes normalised images; detectors and segmenters normalise them.
    batch = model.prepared([pixels])
    if not isinstance(batch, ImageList):
        batch = Preparation(model.trunk, None).eval()([pixels])[0]
    trace, patch = model.trunk.trace(batch), model.reduced.backbone.spec.patch
    cover = tuple(
        real * cells * side / size
        for real, cells, side, size in zip(
            image.shape[-2:], trace.grids[0], patch, batch.image_sizes[0], strict=True
        )
    )
    return trace, (cover[0], cover[1])


def covered(
    targets: Mapping[str, Any],
    size: tuple[int, int],
    grid: tuple[int, int],
    cover: tuple[float, float],
    least: float = 0.5,
) -> Tensor:
    """Mark the patches that objects cover well enough, ``[rows * columns]`` bool.

    Args:
        targets: "masks" ``[N, H, W]``, or else "boxes" ``[N, 4]`` (left, top, right and bottom), in
            pixels of the image.
        size: height and width of the image.
        grid: patch rows and columns.
        cover: height and width that the patches cover, in pixels of the image.
        least: share of a patch's part inside the image that objects must cover.
    """
    if "masks" in targets:
        union = targets["masks"].as_subclass(Tensor).bool().any(0).float()
    elif "boxes" in targets:
        union = torch.zeros(size)
        for left, top, right, bottom in targets["boxes"].as_subclass(Tensor).round().int().tolist():
            union[max(0, top) : bottom, max(0, left) : right] = 1.0
    else:
        raise ValueError(
            f"foreground needs boxes or masks, but the sample has {', '.join(sorted(targets))}"
        )
    # Look at 16 x 16 places in each patch; those outside the image do not count.
    fine = [cells * _PLACES for cells in grid]
    places = [
        ((torch.arange(n) + 0.5) * (reach / n)).long() for n, reach in zip(fine, cover, strict=True)
    ]
    real = [place < side for place, side in zip(places, size, strict=True)]
    rows, columns = (place.clamp_max(side - 1) for place, side in zip(places, size, strict=True))
    inside = (real[0][:, None] & real[1]).float()
    found = union[rows][:, columns] * inside
    share = F.avg_pool2d(torch.stack([found, inside])[:, None], _PLACES)[:, 0]
    return (share[0] >= least * share[1].clamp_min(1e-9)).flatten()
