"""Draw an image beside what a classifier answers and, with a method, the patches that it kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from foveate.core import Trace
from foveate.viz.colours import EXTRA
from foveate.viz.grid import Box, as_image, laid, panel, seen, shrunk
from foveate.viz.layout import Cell, chart, page
from foveate.viz.steps import steps
from foveate.viz.tokens import LEFT_OUT, MERGED, SUMS_UP, with_groups

__all__ = ["LONGEST", "answers"]

LONGEST = 448  # longer side of an image on the page, in pixels


def answers(
    image: Any,
    labels: Sequence[str],
    confidences: Sequence[float],
    *,
    title: Sequence[str] = (),
    trace: Trace | None = None,
    index: int = 0,
    box: Box | None = None,
) -> Image.Image:
    """Draw an image and its answers as bars; between them, the patches of the last block.

    Args:
        image: path, PIL image or uint8 pixels.
        labels: the answers, the most confident one first.
        confidences: their confidences, 0 to 1.
        title: lines above the picture, the first in bold.
        trace: a result of ``ReducedViT.trace``; None if the model has no method.
        index: number of the image in the trace.
        box: part of the image that the model saw, in pixels; None is the whole image.
    """
    picture, box = shrunk(as_image(image), LONGEST, box)
    if trace is None:
        base = seen(panel(picture, (1, 1), box))
    else:
        base = laid(trace, index, picture, box, 1)
    cells, legend = [Cell(base.image(), ["input"])], []
    if trace is not None:
        last = steps(trace, index)[-1]
        words = [
            f"last block: {last.tokens} tokens",
            f"{int(last.working.sum())} of {last.patches} patches",
        ]
        cells.append(Cell(with_groups(base, last).image(), words, last.extra, EXTRA))
        legend += [MERGED] if last.merged.any() else []
        legend += [LEFT_OUT] if last.left_out.any() else []
        legend += [SUMS_UP] if last.extra else []
    panels = cells[0].image
    cells.append(Cell(chart(labels, confidences, panels.size, panels.width), ["answers"]))
    return page(cells, title, legend=legend, columns=len(cells))
