"""A progress bar that does not disturb what is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from foveate.bench.run import Progress

__all__ = ["progress_bar"]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a function that shows progress as a bar on the terminal's error output."""
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,  # its thread would wake up in the middle of a sample
        transient=True,
    )
    task = bar.add_task("", visible=False)
    now = ""

    def told(title: str, done: int, total: int) -> None:
        nonlocal now
        if title != now:
            now = title
            bar.reset(task, description=title, total=total, visible=True)
        bar.update(task, completed=done, visible=done < total, refresh=True)

    with bar:
        yield told
