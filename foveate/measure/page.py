"""The page of the demo: one HTML file with everything inside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from foveate.measure.sheets import Sheet, html_table, sheets
from foveate.measure.table import Results, one

__all__ = ["REMARK", "page"]

REMARK = """\
demo is a ViT of 12 blocks, 96 channels and 49 patches, fine-tuned on masked images of
Fashion-MNIST with up to three quarters of their patches gone; its methods work on it as it is.
demo_dynamicvit and demo_svit were trained with their method at keep 0.7 for one more epoch,
demo_spvit and demo_static are demo with gates that were trained alone, for half an epoch or less.
Compare with random: what a method is worth is what it keeps beyond. At batch 1 much of a tiny
model's time goes into starting operations."""


def page(
    results: Results,
    drawn: Mapping[str, str],
    picture: Path,
    detected: tuple[Results, Sequence[Path]] | None,
) -> str:
    """Return one HTML page: no file, script or address beside it.

    Args:
        results: of the demo.
        drawn: plots as SVG text, by name.
        picture: file that shows what methods did to some images.
        detected: what was measured of the detector, and files that show what it found; None where
            it was left out.
    """
    dense = {"run": "demo", "part": "accuracy", "method": ""}
    settings, table = results.about["settings"], results.table
    facts = {
        "images": f"{one(table, 'images', **dense):.0f} test images of {settings['data']}",
        "machine": ", ".join(table["machine"].unique()),
        "commit": ", ".join(table["commit"].unique()),
        "command": results.about["command"],
    }
    by_speed = max(name for name in drawn if name.startswith("accuracy-speed"))
    accuracy = next(iter(sheets(results, blocks=False)))
    parts = {
        "style": _STYLE,
        "accuracy": f"{one(table, 'top1', **dense):.1f}",
        "images": facts["images"],
        "macs": f"{one(table, 'macs', **dense) / 1e6:.1f}",
        "plots": "".join(
            f"<figure>{svg[svg.index('<svg') :]}</figure>"
            for svg in (drawn["accuracy-macs"], drawn[by_speed])
        ),
        "table": _table(accuracy),
        "remark": html.escape(" ".join([REMARK, *accuracy.notes])),
        "sheet": _embedded(picture),
        "detector": "" if detected is None else _detector(*detected),
        "facts": "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
            for name, value in facts.items()
        ),
    }
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], _TEMPLATE)


def _detector(found: Results, scenes: Sequence[Path]) -> str:
    """Show what the detector found, with its scores and times."""
    pictures = "".join(
        '<figure><img alt="What the detector found in a scene, and how many blocks worked on each '
        f'patch" src="{_embedded(one)}"></figure>'
        for one in scenes
    )
    tables = "".join(
        f"<p>{html.escape(sheet.title)}</p><div>{_table(sheet)}</div>"
        f"<p>{html.escape(' '.join(sheet.notes))}</p>"
        for sheet in sheets(found, blocks=False)
    )
    return f"{_SCENES}<section>{pictures}</section>{tables}"


def _table(sheet: Sheet) -> str:
    return "\n".join(map(_marked, html_table(sheet).splitlines()))


def _embedded(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _marked(line: str) -> str:
    """Mark what is slower than the dense model, whose interval ends below 1, in a table's line."""
    if ">dense</td>" in line:
        return line
    return re.sub(r"<td>([\d.]+ \[[\d.]+, 0\.\d+\])", r'<td class="slow">\1', line)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
figure { margin: 0 0 1.5rem; }
figure, div { overflow-x: auto; }
svg, img { width: 100%; min-width: 30rem; height: auto; }
section { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #333; white-space: normal; vertical-align: bottom; }
.words { text-align: left; }
td.slow, b { color: #9a3412; font-weight: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
"""

_SCENES = """<h2>A detector that looks only where it matters</h2>
<p>A small Mask R-CNN, trained on scenes of garments and then with SViT, whose gates decide for each
patch in each block: what a block skips keeps its value and may come back later. Each picture has a
test scene, what was found in it, and how many blocks worked on each patch.</p>
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
<p>A small ViT, trained on Fashion-MNIST and fine-tuned on masked images, run with fewer tokens by
every method. Dense it is right on {{accuracy}} % of {{images}} and costs {{macs}} million
multiply-adds an image.</p>
<h2>Accuracy against cost</h2>
{{plots}}
<h2>Every cell</h2>
<div>{{table}}</div>
<p>{{remark}} <b>Slower than dense</b> is marked.</p>
<h2>What each method looks at</h2>
<figure><img alt="One row an image, one column a method: what each kept or merged"
src="{{sheet}}"></figure>
{{detector}}
<h2>How it was measured</h2>
<dl>{{facts}}</dl>
</body>
</html>
"""
