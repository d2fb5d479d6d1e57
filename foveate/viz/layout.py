"""Set panels, captions, legends and colour bars on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.viz.colours import matplotlib, overlay

__all__ = ["Bar", "Cell", "Key", "chart", "font_of", "page", "stacked"]

_PAPER, _INK, _QUIET = (255, 255, 255), (20, 20, 20), (90, 90, 90)
_BAR, _TRACK = (168, 208, 236), (242, 244, 246)  # light enough for words to stand on them
_WIDEST = 7  # panels in a row
_MOST_PIXELS = 178_000_000  # Pillow refuses to open larger files
_TALL = 1.6  # least ratio of width to height of a page with several rows


@dataclass(frozen=True)
class Key:
    """One entry of a legend: words, and the colours that they explain."""

    words: str
    colours: Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Bar:
    """A colour bar with the meaning of its colours and evenly spaced numbers below it.

    ``steps`` is the number of even colour steps; 0 is a smooth scale.
    """

    words: str
    ticks: Sequence[str]
    steps: int = 0


@dataclass(frozen=True)
class Cell:
    """A panel, the words below it, and a last line of ``marks`` small squares."""

    image: Image.Image
    words: Sequence[str] = ()
    marks: int = 0
    mark_colour: tuple[int, int, int] = _INK


@dataclass
class _Type:
    """Fonts of a page, and the line height and gap that follow from their size."""

    size: int
    plain: ImageFont.FreeTypeFont = field(init=False)
    bold: ImageFont.FreeTypeFont = field(init=False)

    def __post_init__(self) -> None:
        self.plain, self.bold = font_of(self.size), font_of(self.size, bold=True)
        self.line = round(1.35 * self.size)
        self.gap = max(4, round(0.6 * self.size))

    def wrapped(self, words: str, width: int, bold: bool = False) -> list[str]:
        """Break words into lines no wider than ``width``; longer words are split."""
        font = self.bold if bold else self.plain
        lines, line = [], ""
        for word in words.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = ""
            for letter in word:
                if line and font.getlength(line + letter) > width:
                    lines.append(line)
                    line = ""
                line += letter
        return [*lines, line] if line else lines


def _type_for(width: int) -> _Type:
    """Choose the type of a page by the width of its panels."""
    return _Type(int(min(36, max(12, width / 19))))


@lru_cache
def font_of(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load the font of all pictures, which comes with matplotlib, in a size in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(
        str(Path(matplotlib().get_data_path(), "fonts", "ttf", name)), size=size
    )


def page(
    cells: Sequence[Cell],
    title: Sequence[str] = (),
    *,
    legend: Sequence[Key] = (),
    bar: Bar | None = None,
    columns: int | None = None,
    heads: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Set panels of equal size in rows, with words.

    Args:
        cells: the panels, row by row.
        title: lines above the panels, the first in bold.
        legend: entries of the legend below the panels.
        bar: colour bar below the panels.
        columns: number of panels in a row; None chooses it by the panels' shape.
        heads: words above each column.
    """
    width = max(cell.image.width for cell in cells)
    height = max(cell.image.height for cell in cells)
    columns = _columns(len(cells), width, height) if columns is None else columns
    type_ = _type_for(width)
    gap, line = type_.gap, type_.line
    pitch = max(width, 8 * type_.size) + gap
    words = [[w for text in c.words for w in type_.wrapped(text, pitch - gap)] for c in cells]
    # Marks stand below the words, so they need a line of their own.
    lines = [len(w) + bool(c.marks) for w, c in zip(words, cells, strict=True)]
    rows = [range(i, min(i + columns, len(cells))) for i in range(0, len(cells), columns)]
    row_heights = [
        max(cells[i].image.height for i in row) + max(lines[i] for i in row) * line + gap
        for row in rows
    ]
    across = max(columns * pitch + gap, 24 * type_.size)
    above = [
        (w, number == 0)
        for number, text in enumerate(title)
        for w in type_.wrapped(text, across - 2 * gap, number == 0)
    ]
    tops = [[w for text in head for w in type_.wrapped(text, pitch - gap)] for head in heads]
    top = gap + len(above) * line + bool(above) * gap
    head = max((len(t) for t in tops), default=0) * line
    keys = _key_lines(legend, type_, across - 2 * gap)
    below = len(keys) * line + bool(keys) * gap
    below += 0 if bar is None else 2 * line + type_.size
    sheet = _blank(across, top + head + sum(row_heights) + below + gap)
    pen = ImageDraw.Draw(sheet)
    for number, (text, bold) in enumerate(above):
        font = type_.bold if bold else type_.plain
        pen.text((gap, gap + number * line), text, font=font, fill=_INK if bold else _QUIET)
    for number, text_lines in enumerate(tops):
        for down, text in enumerate(text_lines):
            pen.text((gap + number * pitch, top + down * line), text, font=type_.plain, fill=_INK)
    y = top + head
    for row, tall in zip(rows, row_heights, strict=True):
        for place, i in enumerate(row):
            x = gap + place * pitch
            sheet.paste(cells[i].image, (x, y))
            _caption(pen, type_, (x, y + cells[i].image.height), words[i], cells[i])
        y += tall
    for row_of_keys in keys:
        _keys(pen, type_, (gap, y), row_of_keys)
        y += line
    if bar is not None:
        _bar(sheet, type_, (gap, y + bool(keys) * gap), min(across - 2 * gap, 40 * type_.size), bar)
    return sheet


def chart(
    labels: Sequence[str], values: Sequence[float], size: tuple[int, int], width: int
) -> Image.Image:
    """Draw shares of a whole as horizontal bars, with labels and percentages on them.

    Args:
        labels: what each bar stands for.
        values: their lengths, 0 to 1.
        size: least width and height in pixels; the words may need more.
        width: width of the page's panels, which sets the size of the type.
    """
    type_ = _type_for(width)
    least = round(1.6 * type_.size)
    across = max(size[0], 16 * type_.size)
    pitch = min(max(least, size[1] // len(labels)), 2 * least)
    drawn = _blank(across, max(size[1], pitch * len(labels)))
    pen = ImageDraw.Draw(drawn)
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        top, middle = number * pitch, number * pitch + (pitch - 2) / 2
        pen.rectangle((0, top, across - 1, top + pitch - 3), fill=_TRACK)
        pen.rectangle((0, top, round(value * (across - 1)), top + pitch - 3), fill=_BAR)
        font = type_.plain if number else type_.bold
        share = f"{value:.1%}"
        room = across - type_.size - font.getlength(share)
        words = _shortened(label, font, room - type_.size)
        pen.text((type_.gap, middle), words, font=font, fill=_INK, anchor="lm")
        pen.text((across - type_.gap, middle), share, font=font, fill=_INK, anchor="rm")
    return drawn


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text off where it is too wide, with an ellipsis in place of the rest."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text.rstrip() + "\u2026"


def stacked(pages: Sequence[Image.Image]) -> Image.Image:
    """Set pages below each other on one sheet."""
    width = max(page.width for page in pages)
    sheet = _blank(width, sum(page.height for page in pages))
    y = 0
    for one in pages:
        sheet.paste(one, (0, y))
        y += one.height
    return sheet


def _blank(width: int, height: int) -> Image.Image:
    if width * height > _MOST_PIXELS:
        raise ValueError(
            f"a picture of {width} x {height} pixels is too large for one file: draw fewer images"
        )
    return Image.new("RGB", (width, height), _PAPER)


def _columns(panels: int, width: int, height: int) -> int:
    """Choose one row if it is short, otherwise rows of equal length on a page wider than high."""
    if panels <= _WIDEST - 1 and width <= 2 * height:
        return panels
    best = [n for n in range(1, _WIDEST + 1) if n * width >= _TALL * -(-panels // n) * height]
    columns = min(best[0] if best else _WIDEST, panels)
    return -(-panels // -(-panels // columns))


def _caption(
    pen: ImageDraw.ImageDraw, type_: _Type, at: tuple[int, int], words: list[str], cell: Cell
) -> None:
    x, y = at
    for number, text in enumerate(words):
        pen.text((x, y + number * type_.line), text, font=type_.plain, fill=_INK)
    y += len(words) * type_.line
    side = round(0.8 * type_.size)
    most = max(1, cell.image.width // (side + 3))
    for number in range(min(cell.marks, most)):
        left = x + number * (side + 3)
        box = (left, y + 2, left + side, y + 2 + side)
        pen.rectangle(box, fill=cell.mark_colour, outline=_INK)


def _key_lines(legend: Sequence[Key], type_: _Type, width: int) -> list[list[Key]]:
    """Distribute the entries over lines, as many in a line as fit."""
    lines: list[list[Key]] = []
    used = 0
    for key in legend:
        needs = _key_width(key, type_)
        if not lines or used + needs > width:
            lines.append([])
            used = 0
        lines[-1].append(key)
        used += needs
    return lines


def _key_width(key: Key, type_: _Type) -> int:
    return round(type_.plain.getlength(key.words)) + 3 * type_.size


def _keys(pen: ImageDraw.ImageDraw, type_: _Type, at: tuple[int, int], keys: list[Key]) -> None:
    x, y = at
    for key in keys:
        side = type_.size
        for number, colour in enumerate(key.colours):
            left, right = (x + side * n / len(key.colours) for n in (number, number + 1))
            pen.rectangle((left, y + 2, right, y + 2 + side), fill=colour)
        pen.rectangle((x, y + 2, x + side, y + 2 + side), outline=_INK)
        pen.text((x + round(1.5 * side), y), key.words, font=type_.plain, fill=_INK)
        x += _key_width(key, type_)


def _bar(sheet: Image.Image, type_: _Type, at: tuple[int, int], width: int, bar: Bar) -> None:
    x, y = at
    pen = ImageDraw.Draw(sheet)
    pen.text((x, y), bar.words, font=type_.plain, fill=_INK)
    along = (np.arange(width) + 0.5) / width
    if bar.steps:
        along = np.floor(along * bar.steps) / max(1, bar.steps - 1)
    strip = overlay(np.full((type_.size, width, 3), 128.0), along)
    sheet.paste(Image.fromarray(np.round(strip).astype(np.uint8)), (x, y + type_.line))
    for number, tick in enumerate(bar.ticks):
        long = type_.plain.getlength(tick)
        if bar.steps:  # in the middle of each step
            middle = width * (number + 0.5) / len(bar.ticks)
        else:
            middle = width * number / max(1, len(bar.ticks) - 1)
        left = min(max(0, middle - long / 2), width - long)
        pen.text((x + left, y + type_.line + type_.size), tick, font=type_.plain, fill=_INK)
