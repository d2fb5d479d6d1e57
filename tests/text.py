"""Sheets as a terminal of some width shows them."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console

from foveate.measure.sheets import Sheet, show

__all__ = ["text_of"]


def text_of(sheets: Iterable[Sheet], width: int) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, highlight=False)
    for sheet in sheets:
        show(sheet, console)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
