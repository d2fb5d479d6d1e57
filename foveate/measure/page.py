"""The page of the demo: one HTML file with everything inside."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from foveate.measure.sheets import Sheet, sheets
from foveate.measure.table import Results, one

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["page"]


def page(results: Results, drawn: Mapping[str, str], picture: Image) -> str:
    """Return one HTML page: no file, script or address beside it.

    Args:
        results: of the demo.
        drawn: plots as SVG text, by name.
        picture: what methods did to some images.
    """
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    dense = {"run": "demo", "part": "accuracy", "method": ""}
    settings, table = results.about["settings"], results.table
    facts = {
        "images": f"{one(table, 'images', **dense):.0f} test images of {settings['data']}",
        "machine": ", ".join(table["machine"].unique()),
        "commit": ", ".join(table["commit"].unique()),
        "command": results.about["command"],
    }
    by_speed = sorted(name for name in drawn if name.startswith("accuracy-speed"))
    accuracy = next(iter(sheets(results, blocks=False)))
    parts = {
        "style": _STYLE,
        "accuracy": f"{one(table, 'top1', **dense):.1f}",
        "images": facts["images"],
        "macs": f"{one(table, 'macs', **dense) / 1e6:.1f}",
        "by_macs": _svg(drawn["accuracy-macs"]),
        "by_speed": _svg(drawn[by_speed[-1]]),
        "table": _table(accuracy),
        "notes": " ".join(html.escape(note) for note in accuracy.notes),
        "sheet": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
        "facts": "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
            for name, value in facts.items()
        ),
    }
    text = _TEMPLATE
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def _svg(text: str) -> str:
    return text[text.index("<svg") :]


def _table(sheet: Sheet) -> str:
    """Return a sheet as HTML; what is slower than the dense model is marked."""
    heads = "".join(f"<th>{html.escape(name.lstrip('<'))}</th>" for name in sheet.head)
    lines, family = [f"<thead><tr>{heads}</tr></thead><tbody>"], ""
    for cells in sheet.body:
        model, method, *numbers = cells
        name = method.partition("(")[0]
        first = ' class="first"' if name != family else ""
        family = name
        texts = [f"<td>{html.escape(model)}</td>", f"<th><code>{html.escape(method)}</code></th>"]
        for number in numbers:
            ends = re.search(r"\[[\d.]+, ([\d.]+)\]", number)
            slow = ' class="slow"' if ends and method != "dense" and float(ends[1]) < 1 else ""
            texts.append(f"<td{slow}>{html.escape(number)}</td>")
        lines.append(f"<tr{first}>{''.join(texts)}</tr>")
    return "<table>" + "".join(lines) + "</tbody></table>"


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
fewer tokens by every method. Dense it is right on {{accuracy}} % of {{images}} and costs {{macs}}
million multiply-adds an image.</p>
<h2>Accuracy against cost</h2>
<figure>{{by_macs}}</figure>
<figure>{{by_speed}}</figure>
<h2>Every cell</h2>
<div class="scroll">{{table}}</div>
<p>What a method is worth is what it keeps beyond dropping patches at random, which costs little
here: the model was fine-tuned on images with up to three quarters of their patches gone. Two
models were trained together with their method at keep 0.7, as the papers do it, for one more epoch:
demo_dynamicvit and demo_svit, whose dense rows are the same weights without the method. The gates
of demo_spvit and demo_static were trained alone at keep 0.7, for half an epoch or less. All other
methods work on the model as it is.</p>
<p class="note">{{notes}} <span style="color:#9a3412">Slower than dense</span> is marked. The model
is tiny (49 patches, 96 channels): at batch 1 much of the time goes into starting operations instead
of arithmetic, and whatever a method computes beside weighs more.</p>
<h2>What each method looks at</h2>
<p><img alt="One row an image, one column a method: what each kept or merged"
src="{{sheet}}"></p>
<h2>How it was measured</h2>
<dl>{{facts}}</dl>
</body>
</html>
"""
