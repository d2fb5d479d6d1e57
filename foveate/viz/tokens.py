"""Draw a trace: patches kept, groups merged, blocks per patch, patches brought back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from foveate.core import Trace
from foveate.viz.captions import Model, caption
from foveate.viz.colours import (
    BROUGHT_BACK,
    EXTRA,
    OKABE_ITO,
    blend,
    dimmed,
    group_colours,
    overlay,
)
from foveate.viz.grid import Box, Panel, as_image, laid
from foveate.viz.layout import Bar, Cell, Key, page
from foveate.viz.steps import Step, changes, steps

__all__ = [
    "LEFT_OUT",
    "MERGED",
    "SUMS_UP",
    "WAITS",
    "brought_back",
    "depth",
    "depth_bar",
    "groups",
    "kept",
    "later_used",
    "tinted",
    "with_depth",
    "with_groups",
    "with_waiting",
]

_RIM = (255, 255, 255)
_DARK = (0, 0, 0)
LEFT_OUT = Key("left out", ((64, 64, 64),))
MERGED = Key("merged: one colour per group", OKABE_ITO[:3])
SUMS_UP = Key("a token that sums up patches left out", (EXTRA,))
WAITS = Key("unused here, used later", (BROUGHT_BACK,))


def kept(
    trace: Trace,
    image: Any,
    *,
    index: int = 0,
    model: Model | None = None,
    box: Box | None = None,
) -> Image.Image:
    """Draw which patches take part, once for each stage; the others are dimmed.

    A stage is a block whose patches differ from the block before. Tokens that stand for no patch
    (fused, package, representative) are counted as squares below the panel.

    Args:
        trace: a result of ``ReducedViT.trace``.
        image: path, PIL image or uint8 pixels; the picture has its resolution.
        index: number of the image in the trace.
        model: the traced model; if given, a title shows its method, tokens and multiply-adds.
        box: part of the image that its patches cover, as in ``Prepared``; None is the whole image.
    """
    found = steps(trace, index)
    stages = changes(found, "working") or found[-1:]
    return _strip(trace, image, index, model, box, stages, _with_kept, _kept_words, [LEFT_OUT])


def groups(
    trace: Trace,
    image: Any,
    *,
    index: int = 0,
    model: Model | None = None,
    box: Box | None = None,
) -> Image.Image:
    """Draw merged patches outlined and in one colour per group, once for each stage.

    A group keeps its colour from block to block; if groups merge, the largest one keeps its own.
    Single patches are not coloured, and those left out are dimmed. Arguments are those of ``kept``.
    """
    found = steps(trace, index)
    stages = changes(found, "group") or found[-1:]
    legend = [MERGED, LEFT_OUT]
    return _strip(trace, image, index, model, box, stages, with_groups, _group_words, legend)


def depth(
    trace: Trace,
    image: Any,
    *,
    index: int = 0,
    model: Model | None = None,
    box: Box | None = None,
) -> Image.Image:
    """Draw how many blocks worked on each patch, on a scale from none to all.

    Arguments are those of ``kept``.
    """
    base = laid(trace, index, as_image(image), box, 2)
    drawn, mean = with_depth(base, trace, index)
    blocks = len(trace.blocks)
    cells = [
        Cell(base.image(), ["input"]),
        Cell(drawn.image(), [f"{mean:.1f} of {blocks} blocks per patch"]),
    ]
    return page(cells, _title(model, trace, index), bar=depth_bar(blocks))


def with_depth(base: Panel, trace: Trace, index: int) -> tuple[Panel, float]:
    """Colour each patch by the number of blocks that worked on it; return the mean too."""
    found = steps(trace, index)[: len(trace.blocks)]
    worked = np.stack([step.working for step in found]).sum(0)
    return tinted(base, worked / len(found)), float(worked[found[0].own].mean())


def depth_bar(blocks: int | None) -> Bar:
    """Make the colour bar of ``with_depth``; None is for models of different depths."""
    words = "blocks that worked on a patch"
    if blocks is None:
        return Bar(words, ["none", "all"])
    return Bar(words, [str(n) for n in range(blocks + 1)], blocks + 1)


def brought_back(
    trace: Trace,
    image: Any,
    *,
    index: int = 0,
    model: Model | None = None,
    box: Box | None = None,
) -> Image.Image:
    """Draw, once for each stage, the patches that are unused now but used by a later block.

    Patches that are never used again are dimmed. Arguments are those of ``kept``.
    """
    found = steps(trace, index)
    later = later_used(found)
    stages = changes(found, "working") or found[-1:]
    place = {id(step): n for n, step in enumerate(found)}

    def draw(base: Panel, step: Step) -> Panel:
        waits = later[place[id(step)]] & ~step.working
        return with_waiting(base.where(step.left_out, dimmed(base.pixels)), base, step, waits)

    def words(step: Step) -> list[str]:
        waits = int((later[place[id(step)]] & ~step.working).sum())
        return [step.label, f"{waits} brought back later"]

    legend = [WAITS, Key("not used again", LEFT_OUT.colours)]
    return _strip(trace, image, index, model, box, stages, draw, words, legend)


def later_used(found: Sequence[Step]) -> list[np.ndarray]:
    """Return for each step the patches that any later step works on, ``[H*W]`` bool."""
    later = [np.zeros_like(found[-1].working)]
    for step in reversed(found[1:]):
        later.append(later[-1] | step.working)
    return later[::-1]


def with_groups(base: Panel, step: Step) -> Panel:
    """Colour the groups of a step and dim patches that are left out."""
    drawn = _with_kept(base, step)
    if not step.merged.any():
        return drawn
    colours = group_colours(len(step.hue))[step.hue]
    drawn = drawn.where(step.merged, blend(base.pixels, base.of(colours), 0.6))
    # Outlines run between groups and around them, but not between single patches.
    label = np.where(step.merged, step.group, -1)
    return drawn.painted(base.borders(label) & base.of(step.merged), _DARK)


def with_waiting(drawn: Panel, base: Panel, step: Step, waits: np.ndarray) -> Panel:
    """Colour patches that wait for a later block, and outline them and those left out."""
    lit = drawn.where(waits, blend(base.pixels, np.array(BROUGHT_BACK), 0.6))
    label = np.where(waits, 1, np.where(step.left_out, 2, 0))
    edge = base.borders(label) & (base.of(label) > 0)
    return lit.painted(edge, _RIM)


def _with_kept(base: Panel, step: Step) -> Panel:
    """Dim the patches that a step leaves out, and outline them from inside."""
    drawn = base.where(step.left_out, dimmed(base.pixels))
    return drawn.painted(base.borders(step.working) & base.of(step.left_out), _RIM)


def _kept_words(step: Step) -> list[str]:
    words = f"{int(step.working.sum())} of {step.patches} patches"
    if step.merged.any():
        words += f" in {len(np.unique(step.group[step.working]))} tokens"
    return [step.label, words]


def _group_words(step: Step) -> list[str]:
    alone = len(np.unique(step.group[step.working & ~step.merged]))
    return [
        step.label,
        f"{len(np.unique(step.group[step.merged]))} groups, {alone} single patches",
    ]


def _strip(
    trace: Trace,
    image: Any,
    index: int,
    model: Model | None,
    box: Box | None,
    stages: Sequence[Step],
    draw: Callable[[Panel, Step], Panel],
    words: Callable[[Step], list[str]],
    legend: Sequence[Key],
) -> Image.Image:
    """Draw the input and one panel per stage."""
    base = laid(trace, index, as_image(image), box, 1 + len(stages))
    rows, columns = trace.grids[index]
    cells = [Cell(base.image(), ["input", f"{rows} x {columns} patches"])]
    for step in stages:
        cells.append(Cell(draw(base, step).image(), words(step), step.extra, EXTRA))
    if not any(step.left_out.any() for step in stages):
        legend = [key for key in legend if key is not LEFT_OUT]
    if any(step.extra for step in stages):
        legend = [*legend, SUMS_UP]
    return page(cells, _title(model, trace, index), legend=legend)


def tinted(base: Panel, values: np.ndarray) -> Panel:
    """Lay the colours of one value per patch, 0 to 1, over the panel in grey."""
    shown = np.ones(len(values), dtype=bool)
    return base.where(shown, overlay(base.pixels, base.of(values)))


def _title(model: Model | None, trace: Trace, index: int) -> list[str]:
    return [] if model is None else caption(model, trace, index)
