"""Draw what a detector or a segmenter found, and beside it how many blocks worked on each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from foveate.core import Trace
from foveate.viz.colours import OKABE_ITO
from foveate.viz.grid import Box, as_image, laid
from foveate.viz.layout import Bar, Cell, Key, font_of, page
from foveate.viz.tokens import depth_bar, with_depth

__all__ = ["found_objects", "found_pixels"]

_LONGEST = 448  # longer side of a panel, in pixels
_NAMED = 12  # classes in a legend


def found_objects(
    image: Any,
    answer: dict[str, Tensor],
    class_names: Sequence[str],
    *,
    least: float = 0.5,
    title: Sequence[str] = (),
    trace: Trace | None = None,
    box: Box | None = None,
) -> Image.Image:
    """Draw boxes and masks in the colours of their classes.

    Args:
        image: path, PIL image or uint8 pixels.
        answer: a detector's answer: boxes, labels, scores and perhaps masks, in the image's pixels.
        class_names: names of the classes.
        least: lowest score that is drawn.
        title: lines above the picture, the first in bold.
        trace: a trace of the image; None if the model has no method.
        box: part of the image that the patches of the trace cover; None is the whole image.
    """
    picture, factor = _drawable(as_image(image))
    shown = answer["scores"] >= least
    labels = answer["labels"][shown].tolist()
    colours = [OKABE_ITO[label % len(OKABE_ITO)] for label in labels]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    if "masks" in answer and labels:
        masks = torch.nn.functional.interpolate(
            answer["masks"][shown].float(), pixels.shape[-2:], mode="bilinear"
        )
        pixels = draw_segmentation_masks(pixels, masks[:, 0] >= 0.5, 0.45, colours)
    words = [
        f"{class_names[label]} {100 * score:.0f}"
        for label, score in zip(labels, answer["scores"][shown].tolist(), strict=True)
    ]
    if labels:
        boxes = answer["boxes"][shown] * torch.tensor([*factor, *factor])
        pixels = draw_bounding_boxes(pixels, boxes, colors=colours, width=2)
    drawn = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if labels:
        _name(drawn, boxes.tolist(), words, colours)
    said = f"{len(labels)} of {len(shown)} objects, score at least {100 * least:.0f} %"
    cells, bar = _with_usage([Cell(drawn, [said])], picture, factor, trace, box)
    return page(cells, title, bar=bar, columns=len(cells))


def _name(
    drawn: Image.Image,
    boxes: Sequence[Sequence[float]],
    words: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> None:
    """Write each object's name on its colour, at the upper left corner of its box."""
    draw, font = ImageDraw.Draw(drawn), font_of(13)
    for (left, top, _, _), text, colour in zip(boxes, words, colours, strict=True):
        wide, high = draw.textlength(text, font) + 6, 17
        # The name stands above the box, or inside it if there is no room above.
        x = max(0.0, min(left - 1, drawn.width - wide))
        y = top - high if top >= high else top
        draw.rectangle((x, y, x + wide, y + high), fill=colour)
        dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 128
        draw.text((x + 3, y + 1), text, fill="white" if dark else "black", font=font)


def found_pixels(
    image: Any,
    answer: Tensor,
    class_names: Sequence[str],
    *,
    title: Sequence[str] = (),
    trace: Trace | None = None,
    box: Box | None = None,
) -> Image.Image:
    """Draw a map of classes over its image.

    Args:
        image: path, PIL image or uint8 pixels.
        answer: class of each pixel, ``[h, w]``.
        class_names: names of the classes.
        title: lines above the picture, the first in bold.
        trace: a trace of the image; None if the model has no method.
        box: part of the image that the patches of the trace cover; None is the whole image.
    """
    picture, factor = _drawable(as_image(image))
    labels = torch.nn.functional.interpolate(answer[None, None].float(), picture.size[::-1])[0, 0]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    found, counts = labels.long().unique(return_counts=True)
    classes = found[counts.argsort(descending=True)].tolist()
    colours = [OKABE_ITO[number % len(OKABE_ITO)] for number in classes]
    masks = torch.stack([labels == number for number in classes])
    pixels = draw_segmentation_masks(pixels, masks, 0.55, colours)
    drawn = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    pairs = list(zip(classes, colours, strict=True))[:_NAMED]
    legend = [Key(class_names[number], (colour,)) for number, colour in pairs]
    cells, bar = _with_usage(
        [Cell(drawn, [f"{len(classes)} classes"])], picture, factor, trace, box
    )
    return page(cells, title, legend=legend, bar=bar, columns=len(cells))


def _drawable(image: Image.Image) -> tuple[Image.Image, tuple[float, float]]:
    """Resize an image to a panel; return it, and the factors of its width and height."""
    longest = max(image.size)
    size = (
        max(1, round(image.width * _LONGEST / longest)),
        max(1, round(image.height * _LONGEST / longest)),
    )
    picture = image.resize(size, Image.Resampling.BICUBIC)
    return picture, (size[0] / image.width, size[1] / image.height)


def _with_usage(
    cells: list[Cell],
    picture: Image.Image,
    factor: tuple[float, float],
    trace: Trace | None,
    box: Box | None,
) -> tuple[list[Cell], Bar | None]:
    """Put the image first, and the usage of its patches last."""
    cells = [Cell(picture, ["input"]), *cells]
    if trace is None:
        return cells, None
    if box is not None:
        across, down = factor
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    drawn, mean = with_depth(laid(trace, 0, picture, box, 1), trace, 0)
    blocks = len(trace.blocks)
    cells.append(Cell(drawn.image(), [f"{mean:.1f} of {blocks} blocks per patch"]))
    return cells, depth_bar(blocks)
