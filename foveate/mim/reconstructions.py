"""Draw what a model predicts of hidden patches: visible patches, prediction, original."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from foveate.data import Inputs, Source
from foveate.mim.masks import Mask
from foveate.mim.method import MaskedImageModel

__all__ = ["picture", "some_images"]

_TRIES = 4  # neighbours of an image that cannot be read
_GREY = 0.5  # of hidden patches
_GAP, _HEAD = 6, 18
_SIDE = 112  # images are shown at least this large
_TITLES = ("seen", "predicted", "both", "original")


def some_images(inputs: Inputs, source: Source, number: int) -> tuple[Tensor, list[str]]:
    """Return some readable images, evenly spread, as evaluation sees them.

    They are normalised, ``[n, C, H, W]``. The second value has the errors of images that were
    replaced by others.
    """
    transform = inputs.transform()
    rows: list[Tensor] = []
    wrong: list[str] = []
    number = min(number, len(source))
    for place in range(number):
        first, end = (part * len(source) // number for part in (place, place + 1))
        for index in range(first, min(end, first + _TRIES)):
            try:
                rows.append(transform({"image": source.image(index)})["image"])
                break
            except ValueError as error:  # unreadable: the next one will do
                wrong.append(str(error))
    if not rows:
        why = f": {wrong[0]}" if wrong else ""
        raise ValueError(f"{source.spec} has no readable image to look at{why}")
    images = torch.stack(rows).as_subclass(Tensor)
    if images.is_floating_point():
        return images, wrong
    offset, scale = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (inputs.mean, inputs.std))
    return (images.float() - offset) / scale, wrong


@torch.no_grad()
def picture(
    model: MaskedImageModel,
    images: Tensor,
    mask: Mask,
    mean: Sequence[float],
    std: Sequence[float],
) -> Image.Image:
    """Draw a row for each image: visible patches, the prediction, both together, the original."""
    backbone = model.backbone
    rows, columns = backbone.grid_of(images)
    painted = model.painted(images, model(images, mask)).cpu()
    images = images.cpu().float()
    hidden = mask.hidden.cpu().view(-1, 1, rows, columns)
    for axis, side in zip((2, 3), backbone.spec.patch, strict=True):
        hidden = hidden.repeat_interleave(side, axis)
    scale, offset = (torch.tensor(v).view(1, -1, 1, 1) for v in (std, mean))
    shown, guess = (x * scale + offset for x in (images, painted))
    seen = torch.where(hidden, torch.full_like(shown, _GREY), shown)
    both = torch.where(hidden, guess, shown)
    return _sheet([seen, guess, both, shown])


def _sheet(columns: list[Tensor]) -> Image.Image:
    number, _, height, width = columns[0].shape
    times = max(1, -(-_SIDE // max(height, width)))
    high, wide = height * times, width * times
    size = (len(columns) * (wide + _GAP) + _GAP, _HEAD + number * (high + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (title, column) in enumerate(zip(_TITLES, columns, strict=True)):
        left = _GAP + place * (wide + _GAP)
        draw.text((left, 4), title, fill="black")
        pixels = (column.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for row, image in enumerate(pixels):
            tile = image[..., 0] if image.shape[-1] == 1 else image
            enlarged = (
                Image.fromarray(tile).convert("RGB").resize((wide, high), Image.Resampling.NEAREST)
            )
            sheet.paste(enlarged, (left, _HEAD + row * (high + _GAP)))
    return sheet
