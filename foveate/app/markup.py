"""Write what was found as HTML. All text is escaped, and pictures are part of the page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape

from markdown_it import MarkdownIt
from PIL import Image

from foveate.app.find import Finding, Findings
from foveate.app.look import Look, Time, Variant
from foveate.app.reports import Report, data_url
from foveate.measure.sheets import Sheet, html_table
from foveate.measure.table import pd
from foveate.viz.captions import giga
from foveate.viz.layout import Key

__all__ = ["answers", "found", "numbers", "report", "walk"]

_TOKENS = "tokens, first to last block"


def walk(look: Look, number: int) -> str:
    """Show side by side what every method does in one block."""
    figures: list[str] = []
    keys: dict[str, Key] = {}
    for one in look.variants:
        if one.walk is None:
            continue
        if not figures:
            words = f"<b>input</b><span>{one.walk.found[0].patches} patches</span>"
            figures.append(_figure(_address(one.walk.base.image()), words, "the input"))
        step = min(max(number, 0), len(one.walk) - 1)
        label = one.walk.found[step].label
        words = f"<b>{escape(one.name)}</b><span>{label}: {escape(one.walk.words(step))}</span>"
        alt = f"{one.name}, {label}"
        figures.append(_figure(_address(one.walk.picture(step)), words, alt))
        keys |= {key.words: key for key in one.walk.legend()}
    return f'<div class="fv-figures">{"".join(figures)}</div>{_legend(keys.values())}'


def answers(look: Look) -> str:
    """Show the most likely classes of every variant as bars."""
    first = look.variants[0]
    if not first.answers:
        return "<p>This model has no classifier: compare the features in the table.</p>"
    cards = []
    for one in look.variants:
        agrees = one.answers[0][0] == first.answers[0][0]
        said = "" if one is first else "same answer as dense" if agrees else "another answer"
        bars = "".join(
            f'<li><i style="width:{100 * share:.1f}%"></i><span>{escape(label)}</span>'
            f"<span>{share:.1%}</span></li>"
            for label, share in one.answers
        )
        mark = "fv-same" if agrees else "fv-other"
        cards.append(
            f'<section><h4>{escape(one.name)} <em class="{mark}">{said}</em></h4>'
            f'<ol class="fv-bars">{bars}</ol></section>'
        )
    return f'<div class="fv-cards">{"".join(cards)}</div>'


def numbers(look: Look) -> str:
    """Show tokens, multiply-adds and times of every variant as a table."""
    dense = look.variants[0]
    head = ["method", _TOKENS, "GMACs, of dense", "share", "features like dense"]
    timed = dense.time is not None
    head += ["ms", "times as fast", "given the noise"] * timed
    body = []
    for one in look.variants:
        name = one.name + ("" if one.trained else " (untrained)")
        cells = [name, _tokens(one), giga(one.macs, dense.macs)]
        cells += [f"{one.macs / dense.macs:.0%}", f"{one.likeness:.3f}"]
        body.append([*cells, *_timed(one.time)])
    notes = [f"Multiply-adds are counted for this image. {_how(look.rounds, look.setting)}"]
    notes.append("Features are compared by the mean cosine over all patches on the full grid.")
    if not all(one.trained for one in look.variants):
        notes.append("Untrained gates have random weights, so their choice means nothing.")
    return _sheet(Sheet("Cost and time", pd.DataFrame(body, columns=head), head[:2], notes))


def found(look: Findings) -> str:
    """Show what a detector or segmenter found, picture by picture, and what it cost."""
    dense, sections = look.each[0], []
    widest = max(one.picture.width for one in look.each)
    for one in look.each:
        share = 100 * one.picture.width / widest  # panels are of one size in all pictures
        image = (
            f'<figure><div><img style="width:{share:.1f}%" src="{_address(one.picture)}" '
            f'alt="What {escape(one.name)} found"></div></figure>'
        )
        sections.append(
            f'<section class="fv-wide"><h4>{escape(one.name)}</h4>{image}'
            f"<p>{escape(_named(one, look.objects))}</p></section>"
        )
    head = [
        "method",
        "objects" if look.objects else "classes",
        "patches used",
        "GMACs, of dense",
        "share",
    ]
    head += ["ms", "times as fast", "given the noise"] * (dense.time is not None)
    body = [
        [
            one.name,
            str(len(one.found)),
            "all" if one.usage is None else f"{one.usage:.0%}",
            giga(one.macs, dense.macs),
            f"{one.macs / dense.macs:.0%}",
            *_timed(one.time),
        ]
        for one in look.each
    ]
    notes = [f"Multiply-adds do not include {look.left_out}."] if look.left_out else []
    notes.append(_how(look.rounds, look.setting))
    table = Sheet("Cost and time", pd.DataFrame(body, columns=head), head[:1], notes)
    return "".join(sections) + _sheet(table)


def report(one: Report) -> str:
    """Show a run or a comparison: facts, tables, plots and pictures, settings."""
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in one.facts.items()
    )
    parts = [f"<h3>{escape(one.title)}</h3>", _paragraph(one.notes)]
    parts += [f'<dl class="fv-facts">{facts}</dl>'] if facts else []
    parts += [f'<div class="fv-page">{_markdown(page)}</div>' for page in one.pages]
    parts += [_sheet(sheet) for sheet in one.sheets]
    pictures = (
        _figure(where, f"<span>{escape(name)}</span>", name) for name, where in one.pictures.items()
    )
    parts += [f'<div class="fv-plots">{"".join(pictures)}</div>'] if one.pictures else []
    if one.recipe:
        parts.append(
            f"<details><summary>Settings</summary><pre>{escape(one.recipe)}</pre></details>"
        )
    return "".join(parts)


# Parts -------------------------------------------------------------------------------------------


def _sheet(sheet: Sheet) -> str:
    table = f'<div class="fv-scroll">{html_table(sheet)}</div>'
    return f"<h4>{escape(sheet.title)}</h4>{table}{_paragraph(sheet.notes)}"


def _markdown(text: str) -> str:
    """Make HTML of Markdown; HTML in it is escaped."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    return str(reader.render(text))


def _timed(time: Time | None) -> list[str]:
    if time is None:
        return []
    if not time.verdict:
        return [_ms(time), "", ""]
    return [_ms(time), _interval(time), time.verdict]


def _ms(time: Time) -> str:
    return f"{time.ms:.0f}" if time.ms >= 100 else f"{time.ms:.3g}"


def _interval(time: Time) -> str:
    return f"{time.times.median:.2f} [{time.times.low:.2f}, {time.times.high:.2f}]"


def _how(rounds: int, setting: str) -> str:
    if not rounds:
        return "Nothing was timed."
    return (
        f"Times are medians of {rounds} interleaved rounds on this machine ({setting}); brackets "
        "hold the interval of the paired rounds. Numbers to publish need 30 rounds on an idle "
        "machine."
    )


def _tokens(one: Variant) -> str:
    """Write the tokens of each block; write equal numbers in a row once, with their count."""
    runs: list[list[int]] = []
    for count in one.tokens:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count} x {often}" if often > 1 else str(count) for count, often in runs)


def _named(one: Finding, objects: bool) -> str:
    if not one.found:
        return "Nothing was found." if objects else "No class was found."
    shown = ", ".join(f"{label} {share:.0%}" for label, share in one.found[:20])
    more = f" and {len(one.found) - 20} more" if len(one.found) > 20 else ""
    return ("Found: " if objects else "Shares of the pixels: ") + shown + more


def _legend(keys: Iterable[Key]) -> str:
    items = "".join(
        "<li>"
        + "".join(f'<i style="background:rgb{colour}"></i>' for colour in key.colours)
        + f"{escape(key.words)}</li>"
        for key in keys
    )
    return f'<ul class="fv-legend">{items}</ul>' if items else ""


def _paragraph(sentences: Sequence[str]) -> str:
    text = " ".join(sentences)
    return f'<p class="fv-note">{escape(text)}</p>' if text else ""


def _figure(address: str, caption: str, alt: str) -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img src="{address}" alt="{escape(alt)}">{below}</figure>'


def _address(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    return data_url(file.getvalue(), "image/webp")
