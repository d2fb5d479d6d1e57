"""What the demo shows: a table for the terminal and a page that stands alone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foveate.demo.cells import Row

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

__all__ = ["page", "plots", "table"]

MARKS = {"": "", "gates": " *", "whole": " +"}

# Okabe and Ito's colours and markers of their own: told apart without colours too.
_LOOKS = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#D55E00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)


def _speed(row: Row, batch: int) -> str:
    speed = row.speed[batch]
    return f"{speed['ratio']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})"


def table(rows: Sequence[Row], batches: Sequence[int], *, tokens: bool = True) -> Table:
    """The rows for the terminal; speed over the dense model with its 95 % interval.

    ``tokens=False`` leaves the tokens out, for narrow terminals.
    """
    from rich.table import Table

    shown = Table(header_style="bold", pad_edge=False, box=None, padding=(0, 1, 0, 0))
    shown.add_column("method", no_wrap=True)
    for name in ("right\n%", "MMACs\n", *["tokens\nleft"] * tokens):
        shown.add_column(name, justify="right", no_wrap=True)
    for batch in batches:
        shown.add_column(f"speed over dense\nat batch {batch}", justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.method + MARKS[row.trained],
            f"{row.accuracy:.1f}",
            f"{1000 * row.gmacs:.1f}",
            *[f"{row.tokens:.0f}"] * tokens,
            *(_speed(row, batch) for batch in batches),
        )
    return shown


def plots(rows: Sequence[Row], batches: Sequence[int]) -> dict[str, str]:
    """Accuracy against counted cost and against measured speed, as SVG text by name."""
    batch = max(batches)
    return {
        "accuracy-macs": _plot(rows, lambda r: 1000 * r.gmacs, "million multiply-adds an image"),
        "accuracy-speed": _plot(
            rows,
            lambda r: r.speed[batch]["per_second"],
            f"images a second at batch {batch}, measured",
        ),
    }


def page(
    rows: Sequence[Row],
    batches: Sequence[int],
    facts: Mapping[str, Any],
    drawn: Mapping[str, str],
    sheet: Image,
) -> str:
    """One HTML page with everything inside: no file, script or address beside it."""
    dense = rows[0]
    picture = io.BytesIO()
    sheet.save(picture, "PNG", optimize=True)
    encoded = base64.b64encode(picture.getvalue()).decode()
    listed = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items()
    )
    parts = {
        "style": _STYLE,
        "accuracy": f"{dense.accuracy:.1f}",
        "macs": f"{1000 * dense.gmacs:.1f}",
        "by_macs": drawn["accuracy-macs"],
        "by_speed": drawn["accuracy-speed"],
        "table": _table(rows, batches),
        "sheet": f"data:image/png;base64,{encoded}",
        "facts": listed,
    }
    text = _TEMPLATE
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def _table(rows: Sequence[Row], batches: Sequence[int]) -> str:
    heads = ["method", "accuracy %", "MMACs", "tokens left"]
    heads += [f"speed x dense, batch {batch}" for batch in batches]
    lines = ["<thead><tr>", *(f"<th>{html.escape(h)}</th>" for h in heads), "</tr></thead><tbody>"]
    family = ""
    for row in rows:
        name = row.method.partition("(")[0]
        first = ' class="first"' if name != family else ""
        family = name
        cells = [f"{row.accuracy:.1f}", f"{1000 * row.gmacs:.1f}", f"{row.tokens:.0f}"]
        lines.append(f"<tr{first}><th><code>{html.escape(row.method)}</code>")
        lines.append(f"<sup>{MARKS[row.trained].strip()}</sup></th>" if row.trained else "</th>")
        lines += [f"<td>{cell}</td>" for cell in cells]
        for batch in batches:
            slow = row is not rows[0] and row.speed[batch]["high"] < 1
            lines.append(f'<td class="{"slow" if slow else "speed"}">{_speed(row, batch)}</td>')
        lines.append("</tr>")
    return "<table>" + "".join(lines) + "</tbody></table>"


def _plot(rows: Sequence[Row], across: Any, label: str) -> str:
    """Accuracy against something, one line a method, as SVG text."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    families: dict[str, list[Row]] = {}
    for row in rows[1:]:
        families.setdefault(row.method.partition("(")[0], []).append(row)
    for number, (name, members) in enumerate(families.items()):
        colour, marker = _LOOKS[number % len(_LOOKS)]
        points = [(across(row), row.accuracy) for row in members]
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=colour,
            marker=marker,
            linestyle="-" if number < len(_LOOKS) else "--",
            markersize=5,
            linewidth=1.2,
            label=name,
        )
    dense = rows[0]
    axes.plot([across(dense)], [dense.accuracy], "k*", markersize=12, label="dense")
    axes.axhline(dense.accuracy, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.8rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p.lead { font-size: 1.1rem; color: #333; }
figure { margin: 0 0 1.5rem; }
svg, img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid #333; white-space: normal; vertical-align: bottom; }
tbody th { text-align: left; font-weight: normal; }
tr.first > * { border-top: 1px solid #ccc; }
td.slow { color: #9a3412; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { color: #555; } dd { margin: 0; }
.note { color: #555; font-size: .92rem; }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>foveate: the demo</title>
<style>{{style}}</style>
</head>
<body>
<h1>foveate: the demo</h1>
<p class="lead">A small ViT, trained on Fashion-MNIST and fine-tuned on masked images, run with
fewer tokens by every method. Dense it is right on {{accuracy}} % of the 2 000 shipped test images
and costs {{macs}} million multiply-adds an image.</p>
<h2>Accuracy against cost</h2>
<figure>{{by_macs}}</figure>
<figure>{{by_speed}}</figure>
<h2>Every cell</h2>
<div class="scroll">{{table}}</div>
<p>What a method is worth is what it keeps beyond dropping patches at random, which costs little
here: the model was fine-tuned on images with up to three quarters of their patches gone. Two
methods were trained with the model, as their papers do it, for one more epoch; the dense model was
not.</p>
<p class="note"><sup>+</sup> trained with the model at keep 0.7. <sup>*</sup> gates trained alone at
keep 0.7, for half an epoch or less. All other methods work on the model as it is. Speed is over the
dense model with its 95 % interval, measured on this machine in one interleaved run;
<span style="color:#9a3412">slower than dense</span> is marked. The model is tiny (49 patches, 96
channels): at batch 1 much of the time goes into starting operations instead of arithmetic, and
whatever a method computes beside weighs more.</p>
<h2>What each method looks at</h2>
<p><img alt="One row an image, one column a method: what each kept or merged"
src="{{sheet}}"></p>
<h2>How it was measured</h2>
<dl>{{facts}}</dl>
</body>
</html>
"""
