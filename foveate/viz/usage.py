"""Measure which patches each block uses over a data set: inside and outside objects, and where.

The charts follow figures 5a and 6, and the statistics beside figure 11, of Liu et al., "Revisiting
Token Pruning for Object Detection and Instance Segmentation", WACV 2024.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import Trace
from foveate.core.evaluation import evaluating
from foveate.data import Source, Unreadable, dense_eval_transform
from foveate.dense import Hosting
from foveate.viz.charts import COLOURS, QUIET, new_figure
from foveate.viz.dense import covered, trace_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Usage", "UsageSums", "usage", "usage_figure"]

_log = logging.getLogger(__name__)
_INSIDE, _OUTSIDE, _BACK = COLOURS[1], COLOURS[0], COLOURS[5]


@dataclass(frozen=True)
class Usage:
    """Shares of the patches that each block uses, over the patches of all images.

    Padding does not count. A share of no patches is NaN.

    Attributes:
        images: number of images.
        foreground: share of the patches that lie inside objects; NaN if objects were not given.
        whole, inside, outside: used share of all patches, and of those inside and outside objects,
            ``[blocks]``.
        reactivation: of the patches that a block leaves out, the share that a later block uses,
            ``[blocks]``.
        heat: mean number of blocks that use a place, ``[H, W]``; each image is resized to this
            grid.
    """

    images: int
    foreground: float
    whole: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    reactivation: np.ndarray
    heat: np.ndarray


class UsageSums:
    """Adds up traces for ``Usage``; no trace is kept.

    Attributes:
        images: number of images so far.
    """

    def __init__(self, grid: tuple[int, int] | None = None) -> None:
        """Begin with no images; ``grid`` is the heat map's grid, by default the first image's."""
        self.images, self.grid = 0, grid
        self._sums: dict[str, Tensor] = {}

    def add(self, trace: Trace, inside: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            trace: a trace of images of any sizes.
            inside: patches of the trace's grid that lie inside objects, ``[B, H*W]`` bool.
        """
        used, own, back = trace.used(), trace.own(), trace.brought_back()
        if inside is not None and inside.shape != own.shape:
            raise ValueError(
                f"inside must have shape {list(own.shape)}, as the patches of the trace, got "
                f"{list(inside.shape)}"
            )
        places = {"whole": own}
        if inside is not None:
            inside = inside.to(own.device)
            places |= {"inside": own & inside, "outside": own & ~inside}
        for name, where in places.items():
            self._sum(f"{name} used", (used & where).sum((1, 2)))
            self._sum(name, where.sum())
        self._sum("out", (~used & own).sum((1, 2)))
        self._sum("back", (back & own).sum((1, 2)))
        self.grid = self.grid or trace.grids[0]
        depth = used.sum(0).double().unflatten(1, trace.grid)
        for one, (rows, columns) in zip(depth, trace.grids, strict=True):
            real = one[None, None, :rows, :columns]
            self._sum("heat", F.interpolate(real, self.grid, mode="bilinear")[0, 0])
        self.images += len(own)

    def _sum(self, name: str, values: Tensor) -> None:
        values = values.double().cpu()
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def result(self) -> Usage:
        """Return the shares over all batches; ValueError if none was added."""
        if not self.images:
            raise ValueError("no image was added, so there is no usage to return")
        sums = self._sums
        none = torch.full_like(sums["whole used"], torch.nan)
        shares = {
            name: sums[f"{name} used"] / sums[name] if name in sums else none
            for name in ("whole", "inside", "outside")
        }
        inside = sums.get("inside", torch.tensor(torch.nan))
        return Usage(
            images=self.images,
            foreground=float(inside / sums["whole"]),
            **{name: values.numpy() for name, values in shares.items()},
            reactivation=(sums["back"] / sums["out"]).numpy(),  # 0 / 0 is NaN
            heat=(sums["heat"] / self.images).numpy(),
        )


def usage(
    model: Hosting, source: Source, *, images: int | None = None, least: float = 0.5
) -> Usage:
    """Measure which patches a dense model uses on the images of a data set.

    Args:
        model: a dense backbone, detector or segmenter with a method on its ViT.
        source: images with boxes or masks of objects, as ``foveate.data.open_source`` gives them.
        images: number of images to use, from the first on; None uses all. Unreadable ones are
            left out with a warning.
        least: share of a patch that objects must cover for it to count as inside.
    """
    if not isinstance(model, Hosting):
        raise ValueError(
            f"a dense backbone, detector or segmenter is needed, got {type(model).__name__}"
        )
    prepare, sums = dense_eval_transform(model.reduced.backbone.channels, None), UsageSums()
    count = len(source) if images is None else images
    with evaluating(model):
        for number in range(len(source)):
            if sums.images >= count:
                break
            try:
                sample = prepare(source.sample(number))
            except Unreadable as error:
                _log.warning("skipped %s", error)
                continue
            image = sample["image"].as_subclass(Tensor)
            trace, cover = trace_pixels(model, image)
            size = (image.shape[-2], image.shape[-1])
            inside = covered(sample, size, trace.grid, cover, least)
            sums.add(trace, inside[None])
    return sums.result()


def usage_figure(found: Usage, title: str = "") -> Figure:
    """Draw each block's usage inside and outside objects, what is brought back, and where.

    Args:
        found: a result of ``usage``.
        title: words above the charts, such as the method and the data set.
    """
    figure, ((left, middle, right),) = new_figure(12.0, 3.5, 1, 3)
    blocks = np.arange(len(found.whole))
    if np.isfinite(found.foreground):
        named = f"inside objects ({found.foreground:.0%} of the patches)"
        left.plot(blocks, 100 * found.inside, "-o", color=_INSIDE, markersize=4, label=named)
        words = "outside"
        left.plot(blocks, 100 * found.outside, "-s", color=_OUTSIDE, markersize=4, label=words)
    left.plot(blocks, 100 * found.whole, "--", color=QUIET, linewidth=1.2, label="all")
    left.legend(loc="lower left", frameon=False, fontsize="small")
    left.set_ylabel("patches used, %")
    left.set_title("used by each block", fontsize="medium")
    back = 100 * found.reactivation
    middle.bar(blocks, np.nan_to_num(back), color=_BACK)
    for block in blocks[np.isnan(back)]:
        place: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom"}
        middle.text(block, 2, "all used", color=QUIET, fontsize="x-small", **place)
    middle.set_ylabel("of the patches left out, %")
    middle.set_title("used by a later block", fontsize="medium")
    for panel in (left, middle):
        panel.set_xlabel("block")
        panel.set_xticks(blocks)
        panel.set_ylim(0, 105)
    _heat(figure, right, found)
    images = f"{found.images} image" + "s" * (found.images != 1)
    figure.suptitle(f"{title}, {images}" if title else images, fontsize="medium")
    return figure


def _heat(figure: Figure, panel: Any, found: Usage) -> None:
    panel.set_axis_off()
    panel.set_title("blocks that use a place", fontsize="medium")
    drawn = panel.imshow(found.heat, cmap="viridis", interpolation="nearest")
    figure.colorbar(drawn, ax=panel, label="mean over images", aspect=15, pad=0.03)
