"""An evaluation as tables: for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foveate.bench.result import LEAST_ROUNDS
from foveate.evaluate.occlusion import Occlusion
from foveate.evaluate.rates import Row
from foveate.evaluate.report import Entry, Report
from foveate.evaluate.speed import Speed
from foveate.evaluate.statistics import TokenStatistics

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["Sheet", "markdown", "markdown_table", "printed", "sheets"]

_SPLITS = {"train": "training ", "val": "validation ", "test": "test "}


@dataclass(frozen=True)
class Sheet:
    """A table in words; columns whose name begins with "<" hold text, the others numbers."""

    title: str
    head: tuple[str, ...]
    body: Sequence[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def sheets(report: Report, *, blocks: bool = True) -> Iterator[Sheet]:
    """All tables of a report; ``blocks`` adds those of the tokens, block by block."""
    if any(entry.rows for entry in report.entries):
        yield _accuracy(report)
    if any(entry.occlusion for entry in report.entries):
        yield _occlusion(report)
    if any(entry.pruning for entry in report.entries):
        yield _pruning(report)
    if any(entry.statistics for entry in report.entries):
        yield _tokens(report)
    if blocks:
        for entry in report.entries:
            for name, found in entry.statistics.items():
                yield _per_block(entry, name, found)


def printed(sheet: Sheet) -> Iterator[Table | Text]:
    """A sheet for the terminal: its title, the table, its notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    yield Text(sheet.title, style="bold")

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in sheet.head:
        words = name.startswith("<")
        table.add_column(
            name.lstrip("<"),
            justify="left" if words else "right",
            no_wrap=not words,
            overflow="fold",
        )
    for line in sheet.body:
        table.add_row(*line)
    yield table
    yield from map(Text, sheet.notes)
    yield Text()


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """Everything as one Markdown page.

    Args:
        report: what was found.
        pictures: names of the files beside the page that it shows.
    """
    about, settings = report.machine, report.settings
    lines = ["# Evaluation", ""]
    if report.command:
        lines += [f"    {report.command}", ""]
    lines += [f"- {name}: {_said(value)}" for name, value in settings.items() if value is not None]
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    lines += [
        f"- machine: {where}; torch {about['torch']}, timm {about['timm']}",
        f"- commit: {report.commit or 'unknown'}",
        "",
    ]
    for entry in report.entries:
        known = {name: value for name, value in entry.about.items() if value is not None}
        facts = "; ".join(f"{name} {_said(value)}" for name, value in known.items())
        lines += [f"**{entry.label}**: {facts}", ""]
    for sheet in sheets(report):
        lines += [f"## {sheet.title}", "", *markdown_table(sheet), ""]
        lines += [line for note in sheet.notes for line in (note, "")]
    lines += [line for name in pictures for line in (f"![{name.rpartition('.')[0]}]({name})", "")]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(sheet: Sheet) -> list[str]:
    """Lines of a table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    marks = ["---" if name.startswith("<") else "---:" for name in sheet.head]
    head = [name.lstrip("<") for name in sheet.head]
    return [line(head), line(marks), *map(line, sheet.body)]


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# The tables --------------------------------------------------------------------------------------


def _accuracy(report: Report) -> Sheet:
    pairs = [(entry, row) for entry in report.entries for row in entry.rows.values()]
    rows = [row for _, row in pairs]
    five = any(row.accuracy.top5 is not None for row in rows)
    counted = any(row.macs is not None for row in rows)
    timed = any(entry.speeds for entry in report.entries)
    most = max((row.dense_macs or 0 for row in rows), default=0)
    unit, scale = ("GMACs", 1e9) if most >= 1e9 else ("MMACs", 1e6)
    head = [*["<model"] * (len(report.entries) > 1), "<method", "top-1 %", *["top-5 %"] * five]
    head += [unit, "of dense", "tokens left"] * counted
    head += ["times dense [95 %]", "images/s"] * timed
    body = []
    for entry, row in pairs:
        line = [*[entry.label] * (len(report.entries) > 1), row.name + " *" * row.untrained]
        line += [f"{row.accuracy.top1:.2f}", *[_percent(row.accuracy.top5)] * five]
        line += _cost(row, scale) * counted
        line += _speed(entry.speeds.get(row.name)) * timed
        body.append(tuple(line))
    notes = []
    if any(row.untrained for row in rows):
        notes.append("* new parameters that nobody trained: what it keeps is arbitrary.")
    if counted and any(row.counted == "measured" for row in rows):
        notes.append("Multiply-adds and tokens are means over the images where counts differ.")
    if timed:
        first = next(speed for entry in report.entries for speed in entry.speeds.values())
        spread = max(speed.spread for entry in report.entries for speed in entry.speeds.values())
        trial = " (a trial, not a result)" if first.rounds < LEAST_ROUNDS else ""
        notes.append(
            f"Speed: {first.rounds} interleaved rounds{trial} at batch {first.batch}; of a dense "
            f"model, over itself. That strays by up to {spread:.0%}, and less is no difference."
        )
    images = sorted({row.accuracy.images for row in rows})
    kind = _SPLITS.get(str(report.settings.get("split")), "")
    return Sheet(f"Accuracy on {_few(images)} {kind}images", tuple(head), body, notes)


def _few(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _cost(row: Row, scale: float) -> list[str]:
    if row.macs is None or row.dense_macs is None or row.tokens is None:
        return ["-"] * 3
    return [f"{row.macs / scale:.2f}", f"{row.macs / row.dense_macs:.0%}", f"{row.tokens:.4g}"]


def _speed(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["-"] * 2
    return [f"{speed.ratio:.2f} [{speed.low:.2f}, {speed.high:.2f}]", f"{speed.per_second:.4g}"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _occlusion(report: Report) -> Sheet:
    curves = {entry.label: entry.occlusion for entry in report.entries if entry.occlusion}
    ratios = sorted({ratio for curve in curves.values() for ratio in curve.ratios})
    body = []
    for ratio in ratios:
        line = [f"{ratio:g}"]
        for curve in curves.values():
            line += _point(curve, ratio)
        body.append(tuple(line))
    seeds = len(next(iter(curves.values())).seeds)
    head = ["dropped", *(name for label in curves for name in ("kept", label))]
    return Sheet(
        "Top-1 % with patches of the image dropped at random",
        tuple(head),
        body,
        [f"mean ± standard deviation over {seeds} mask seeds"],
    )


def _point(curve: Occlusion, ratio: float) -> list[str]:
    """Patches kept and accuracy; without a spread where nothing was dropped."""
    if ratio not in curve.ratios:
        return ["-", "-"]
    place = curve.ratios.index(ratio)
    kept, top1 = curve.kept[place], curve.top1[place]
    return [str(kept), f"{top1.mean:.1f}" if kept == curve.patches else str(top1)]


def _pruning(report: Report) -> Sheet:
    several = len(report.entries) > 1
    body = []
    for entry in report.entries:
        for rate in dict.fromkeys(one.rate for one in entry.pruning):
            found = {one.method: one for one in entry.pruning if one.rate == rate}
            kept = " ".join(map(str, found["random"].kept))
            line = [*[entry.label] * several, f"{rate:g}", kept]
            body.append((*line, *(str(found[name].top1) for name in ("random", "attention"))))
    blocks = {one.blocks for entry in report.entries for one in entry.pruning}
    where = "three blocks"  # models of different depth have different ones
    if len(blocks) == 1:
        where = f"blocks {', '.join(map(str, blocks.pop()))}"
    seeds = next(len(entry.pruning[0].seeds) for entry in report.entries if entry.pruning)
    return Sheet(
        f"Top-1 % pruned before {where}, without training",
        (*["<model"] * several, "rate", "kept", "random", "class attention"),
        body,
        [f"random: mean ± standard deviation over {seeds} seeds"],
    )


def _tokens(report: Report) -> Sheet:
    several = len(report.entries) > 1
    body = []
    for entry in report.entries:
        for name, found in entry.statistics.items():
            each, left = found.tokens_per_image, found.last_tokens
            body.append(
                (
                    *[entry.label] * several,
                    name,
                    f"{each.mean:.1f} ± {each.deviation:.1f}",
                    f"{each.low:.1f}-{each.high:.1f}",
                    f"{left.mean:.1f} ± {left.deviation:.1f}",
                    f"{100 * sum(found.usage) / len(found.usage):.1f}",
                    f"{100 * found.usage[-1]:.1f}",
                )
            )
    return Sheet(
        "Tokens of an image, mean over its blocks, and patches used",
        (
            *["<model"] * several,
            *("<method", "tokens", "5-95 %", "in the last block", "used %", "in the last block"),
        ),
        body,
        ["mean ± standard deviation over images"],
    )


def _per_block(entry: Entry, name: str, found: TokenStatistics) -> Sheet:
    body = [
        (
            str(block),
            f"{found.tokens[block]:.1f}",
            f"{100 * found.usage[block]:.1f} ± {100 * found.usage_deviation[block]:.1f}",
            _share(found.reactivation[block]),
            _share(found.at_once[block]),
        )
        for block in range(len(found.usage))
    ]
    return Sheet(
        f"{entry.label}, {name}: tokens block by block",
        ("block", "tokens", "patches used %", "of unused, used later %", "of those, at once %"),
        body,
        [f"over {found.images} images; ± is the standard deviation over images"],
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
