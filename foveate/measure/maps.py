"""Pictures of tokens over a data set: heat maps of the patch grid, and usage block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.measure.style import COLOURS, evenly, new_figure
from foveate.measure.tokens import TokenStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["maps_figure", "usage_figure"]

_SIDE = 1.75  # inches of a map
_MOST = 6  # maps in a row; more stages than that are thinned out evenly


def maps_figure(found: TokenStatistics, title: str = "") -> Figure:
    """Draw a map for each stage: how often the patch at each position is used.

    A second row appears where tokens merge: how many patches the token stands for that carries
    each position. The last map counts the blocks that use each position.
    """
    stages = evenly(found.stages, _MOST)
    keep, group = found.keep[stages], found.group[stages]
    most = float(group.max(initial=1.0))
    rows: list[tuple[str, np.ndarray, float, float]] = []
    if (keep < 1).any() or most <= 1:
        rows.append(("share of images", keep, 0.0, 1.0))
    if most > 1:
        rows.append(("patches a token", group, 1.0, most))
    columns = max(1, len(stages)) + 1
    height = found.keep.shape[1] / found.keep.shape[2] * _SIDE
    figure, panels = new_figure(
        1.6 + columns * _SIDE, 0.3 + len(rows) * (height + 0.3), len(rows), columns
    )
    for panel in (panel for line in panels for panel in line):
        panel.set_axis_off()
    for (words, maps, low, high), line in zip(rows, panels, strict=True):
        image = None
        for block, grid, panel in zip(stages, maps, line, strict=False):
            image = _map(panel, grid, low, high, f"block {block}")
        if image is not None:
            figure.colorbar(image, ax=line[: len(stages)], label=words, aspect=12, pad=0.02)
    last = _map(panels[0][-1], found.keep.sum(0), 0, len(found.keep), "all blocks")
    figure.colorbar(last, ax=panels[0][-1], label="blocks that use it", aspect=12, pad=0.04)
    some = f", {len(stages)} of {len(found.stages)} stages" * (len(stages) < len(found.stages))
    figure.suptitle(f"{title or found.method}, {found.images} images{some}", fontsize="medium")
    return figure


def _map(panel: Any, grid: np.ndarray, low: float, high: float, title: str) -> Any:
    panel.set_axis_off()
    panel.set_title(title, fontsize="small")
    return panel.imshow(grid, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")


def usage_figure(found: TokenStatistics, title: str = "") -> Figure:
    """Draw the patches that each block uses, what is brought back, and tokens image by image."""
    figure, ((left, right),) = new_figure(9.6, 3.4, 1, 2)
    blocks = range(found.usage.shape[1])
    usage, spread = 100 * found.usage.mean(0), 100 * found.usage.std(0)
    left.bar(blocks, usage, color=COLOURS[0], label="used")
    left.errorbar(blocks, usage, spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    back = (100 - usage) * np.nan_to_num(found.reactivation)
    if back.any():
        words = "unused, used by a later block"
        left.bar(blocks, back, bottom=usage, color=COLOURS[5], alpha=0.55, label=words)
        left.legend(loc="upper right", frameon=False, fontsize="small")
    left.set_xlabel("block")
    left.set_ylabel("patches, %" if back.any() else "patches used, %")
    left.set_ylim(0, 135 if back.any() else 105)  # room for the legend above the bars
    left.set_yticks(range(0, 101, 20))
    left.set_xticks(blocks)
    each = found.tokens.mean(1)
    mean = float(each.mean())
    if each.min() == each.max():
        right.bar([mean], [found.images], 0.5, color=COLOURS[2])
        right.set_xlim(mean - 5, mean + 5)
    else:
        right.hist(each, bins=20, color=COLOURS[2])
        right.axvline(mean, color="black", linewidth=1, linestyle="--")
    right.set_xlabel(f"tokens of an image, mean over its blocks (mean {mean:.1f})")
    right.set_ylabel("images")
    figure.suptitle(
        f"{title or found.method}, {found.images} images; whiskers: standard deviation over images",
        fontsize="medium",
    )
    return figure
