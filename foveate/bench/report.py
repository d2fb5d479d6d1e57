"""Results as tables in a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.result import Cell, Comparison, Result, Row
from foveate.bench.timing import DENSE, UNFUSED, Interval

__all__ = ["closing", "comparisons_table", "show_latest", "terminal", "text_of"]

# Columns to do without where there is no room, the first one first.
_DISPENSABLE = ("extra", "MACs", "images/s", "tokens", "peak")
_STYLES = {"faster": "green", "slower": "red", "no difference": "yellow"}


def terminal(width: int = 140) -> Console:
    """The terminal as it is; a file or pipe wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def show_latest(result: Result, console: Console) -> None:
    """Print the newest cell, and before the first one what all of them depend on."""
    for part in opening(result) if len(result.cells) == 1 else []:
        console.print(part)
    console.print(cell_table(result.cells[-1], console))


def text_of(result: Result, width: int) -> str:
    """Everything as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    tables = (cell_table(cell, console) for cell in result.cells)
    for part in (*opening(result), *tables, *closing(result)):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def opening(result: Result) -> list[RenderableType]:
    """What the numbers depend on."""
    about, settings = result.machine, result.settings
    where = about.get("gpu", about["cpu"])
    lines = [
        f"torch {about['torch']}, timm {about['timm']}, python {about['python']}; {where}, "
        f"{about['threads']} threads",
        f"images: {settings.get('images', 'not recorded')}",
    ]
    if "weights" in settings:
        lines.append(f"weights: {settings['weights']}")
    return [*map(Text, lines)]


def cell_table(cell: Cell, console: Console) -> Table:
    """One cell: the dense model, the un-fused one, and every method.

    Columns that others imply are left out where the console is too narrow for them.
    """
    hidden: tuple[str, ...] = ()
    table = _table(cell, hidden)
    for name in _DISPENSABLE:
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= (
            console.width
        ):
            break
        hidden += (name,)
        table = _table(cell, hidden)
    return table


def _table(cell: Cell, hidden: tuple[str, ...]) -> Table:
    table = _plain(
        f"{cell}: {cell.rounds} rounds of {cell.calls} calls, A/A spread {cell.spread:.1%}"
    )
    rows: list[tuple[str, Interval, Interval, Text, Row | None]] = [
        (DENSE, cell.dense, cell.again, Text("A/A"), None)
    ]
    if isinstance(cell.unfused, Interval):
        ms = cell.variants[UNFUSED]
        rows.append((UNFUSED, ms, cell.unfused, _verdict(cell.unfused, cell), None))
    rows += [
        (row.method, row.ms, row.over_dense, _verdict(row.over_dense, cell), row)
        for row in cell.rows
    ]
    columns: dict[str, list[str | Text]] = {
        "method": [name for name, *_ in rows],
        "ms": [f"{ms.median:.2f}" for _, ms, *_ in rows],
        "images/s": [f"{1e3 * cell.batch / ms.median:.4g}" for _, ms, *_ in rows],
        "over dense [95 %]": [str(ratio) for _, _, ratio, *_ in rows],
        "": [verdict for _, _, _, verdict, _ in rows],
        "of oracle [95 %]": [str(row.share) if row else "" for *_, row in rows],
        "extra": [f"{row.extra_of_block:.1%}" if row else "" for *_, row in rows],
        "tokens": [_tokens(row) if row else "" for *_, row in rows],
        "MACs": [f"{row.macs:.2f}" if row and row.macs else "" for *_, row in rows],
        "peak": [_peak(cell, name) for name, *_ in rows],
        "goal": [_goals(row) if row else "" for *_, row in rows],
    }
    shown = {
        title: cells
        for title, cells in columns.items()
        if title not in hidden and any(map(len, cells))
    }
    for title in shown:
        right = title in ("ms", "images/s", "extra", "tokens", "MACs", "peak")
        folds = title in ("method", "goal")
        table.add_column(
            title,
            justify="right" if right else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "ellipsis",
        )
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    if isinstance(cell.unfused, str):
        table.caption, table.caption_justify = f"no un-fused model: {cell.unfused}", "left"
    return table


def _plain(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _verdict(ratio: Interval, cell: Cell) -> Text:
    verdict = ratio.beyond(cell.spread)
    return Text(verdict, style=_STYLES[verdict])


def _peak(cell: Cell, name: str) -> str:
    peak = cell.peak(name)
    return "" if peak is None else f"{peak:.2f}"


def _tokens(row: Row) -> str:
    """From the first block to the last; the extremes where images differ."""
    tokens = row.tokens
    least, most = tokens["fed_last_block_min"], tokens["fed_last_block_max"]
    last = f"{least}" if least == most else f"{least}-{most}"
    return f"{tokens['fed_mean_per_block'][0]:.0f} > {last}"


def _goals(row: Row) -> str:
    return "\n".join(f"{b['of']} {b['goal']:.2f} {b['verdict']}" for b in row.bars)


def closing(result: Result) -> list[RenderableType]:
    """From which batch on methods pay, and what the columns mean."""
    parts: list[RenderableType] = []
    found = result.break_even()
    if found:
        parts.append(Text("From which batch on it pays", style="bold"))
        parts += [Text(f"  {line}") for line in found]
    ways: dict[str, list[str]] = {}
    for cell in result.cells:
        for row in cell.rows:
            if row.parameters is not None and row.method not in ways.setdefault(row.parameters, []):
                ways[row.parameters].append(row.method)
    parts += [Text(f"own parameters {how}: {', '.join(names)}") for how, names in ways.items()]
    parts += [Text(f"left out {name}: {why}") for name, why in result.left_out.items()]
    parts += map(Text, _legend(result))
    return parts


def _legend(result: Result) -> Iterable[str]:
    yield (
        "Medians; ratios are medians of those of every round, with an order-statistic interval. "
        "Faster or slower is what lies beyond the A/A spread: how far the dense model strays from "
        "itself."
    )
    yield (
        "oracle: the same token counts by slicing, without scoring. extra: time beyond it per "
        "block where the method acts, as a share of a dense block. tokens: from the first block "
        "to the last. MACs: over the dense model's."
    )
    if any(cell.memory for cell in result.cells):
        yield "peak: memory of a call, without weights and images, over the dense model's."
    if any(row.bars for cell in result.cells for row in cell.rows):
        yield "A goal holds when it is reached or lies within the A/A spread."
    if result.machine.get("malloc_tuned") is False:
        yield "malloc was not tuned: times are longer and noisier than they need be."
    if result.trial:
        yield "A quick run: a trial, not a result."


def comparisons_table(cell: Cell, found: Sequence[Comparison]) -> Table:
    """Methods of one cell against each other."""
    table = _plain(f"{cell}: A/A spread {cell.spread:.1%}")
    for title in ("method", "", "than", "times as fast [95 %]"):
        table.add_column(title)
    for pair in found:
        verdict = Text(pair.verdict, style=_STYLES[pair.verdict])
        table.add_row(pair.first, verdict, pair.second, str(pair.ratio))
    return table
