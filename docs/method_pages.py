"""The methods' pages of the documentation, made from what each class says of itself.

mkdocs calls this through docs/hooks.py; nothing is written into the tree. To read a page alone:

python docs/method_pages.py evit
"""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path

import timm
import torch
import yaml
from method_table import HOOKS, NEEDS, TRAINING, table
from pictures import machine, measured, method_picture

import foveate
from foveate.config import meanings
from foveate.core import ReducedViT, Reducer
from foveate.registry import method_class

__all__ = ["index_page", "method_page"]

WHEN = yaml.safe_load((Path(__file__).parent / "when.yml").read_text(encoding="utf-8"))

INDEX = """\
---
hide:
  - toc
---

# Methods

Every method is one file, and its options are the fields of one class. They are applied by name,
`foveate.apply(vit, "evit", keep=0.7)`, and their defaults are the papers' values.

{table}

*Acts*: where in a block the token set changes; see [how a pass flows](../flow.md). *Reads*: what of
attention it needs; it stays fused. *Count*: whether every image has the same number of tokens. With
a fixed count shapes are static and the model compiles into one graph.

`"evit(keep=0.8) + tome(r=4, blocks=[10, 11])"` runs two methods after each other.
"""


def index_page() -> str:
    """The table of all methods, as Markdown."""
    return INDEX.format(table=table("{name}.md"))


def method_page(name: str) -> str:
    """One method's page, as Markdown."""
    cls = method_class(name)
    model = foveate.apply(_deit(), name)
    idea, _, rest = _escaped(sys.modules[cls.__module__].__doc__ or "").partition("\n\n")
    return "\n\n".join(
        [
            f"# {cls.__name__}",
            idea.partition(": ")[2][:1].upper() + idea.partition(": ")[2][1:],
            f'<figure class="drawing">{method_picture(name)}</figure>',
            _caption(cls),
            rest.strip(),
            "## When to take it",
            WHEN[name],
            "## Options",
            _options(cls),
            "## Facts",
            _facts(cls, model),
            "## Costs",
            _costs(name, model),
            "## Use",
            f'```python\nmodel = foveate.apply(vit, "{name}"{_usual(cls)})\n```',
            f"The code is in `foveate/methods/{name}.py`.\n",
        ]
    )


def _deit() -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224")


def _caption(cls: type[Reducer]) -> str:
    method = cls()
    late = cls.hooks == ("after",)
    words = ["Full colour: the patch has a token" + (" after" if late else " in") + " this block."]
    if method.parks:
        words.append("Pale: it waits and comes back.")
    if method.drops:
        words.append("Blank: it is gone, or lives on in a token that stands for many.")
    if not method.parks and not method.drops:
        words.append("Cells without a line between them share one token.")
    return (
        f"*{' '.join(words)} The number counts tokens, prefix included. Drawn from a trace of a "
        "small model with random weights on a made-up image: which patches stay means nothing, how "
        "many and what becomes of the others is what the method does.*"
    )


# Options -----------------------------------------------------------------------------------------


def _options(cls: type[Reducer]) -> str:
    words = meanings(cls)
    lines = ["| option | type | default | |", "| --- | --- | --- | --- |"]
    for field in fields(cls):
        default = "" if field.default is MISSING else f"`{field.default!r}`"
        kind = str(field.type).replace("|", "&#124;")
        lines.append(
            f"| `{field.name}` | <code>{kind}</code> | {default} | "
            f"{_escaped(words.get(field.name, ''))} |"
        )
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Docstring text as Markdown: one backtick for code, and no stars that mean emphasis."""
    pieces = re.split(r"(``.*?``)", text.strip())
    return "".join(
        piece.replace("``", "`") if piece.startswith("``") else re.sub(r"([*|])", r"\\\1", piece)
        for piece in pieces
    )


# Facts -------------------------------------------------------------------------------------------


def _facts(cls: type[Reducer], model: ReducedViT) -> str:
    hooks = ", ".join(f"`{hook}`" for hook in cls.hooks)
    where = HOOKS.get(cls.hooks)
    reads = ", ".join(NEEDS[need] for need in sorted(model.reducer.reads))
    losses = ", ".join(f"{name} x {weight:g}" for name, weight in cls.default_loss_weights.items())
    fixed = model.reducer.fixed_count
    rows = {
        "paper": cls.paper,
        "hooks": f"{hooks} ({where})" if where else hooks,
        "reads of attention": reads or "nothing",
        "training": TRAINING[cls.training_need],
        "losses besides the task's": losses or "none",
        "count": "the same for every image" if fixed else "each image has its own",
        "modes": ", ".join(_modes(model)),
        "rate that a budget solves": f"`{cls.rate}`" if cls.rate else "none",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _modes(model: ReducedViT) -> list[str]:
    """The modes that the model accepts."""
    modes = []
    for mode in ("gathered", "packed", "masked"):
        try:
            model.mode = mode
        except ValueError:
            continue
        modes.append(mode)
    model.mode = "auto"
    return modes


def _costs(name: str, model: ReducedViT) -> str:
    counted = foveate.count(model)
    tokens = " ".join(f"{n:g}" for n in counted.tokens)
    how = {
        "exact": "",
        "expected": " (at its target rates, or at most: each image has its own count)",
    }[counted.how]
    text = (
        f"DeiT-S at 224 px, counted by `foveate.count`{how}:\n\n"
        "| | |\n| --- | --- |\n"
        f"| multiply-adds | {counted.macs / 1e9:.2f} of {counted.dense_macs / 1e9:.2f} GMACs "
        f"({counted.ratio:.0%}) |\n"
        f"| of these the method's own | {counted.method_macs / 1e9:.4f} GMACs |\n"
        f"| new parameters | {counted.new_parameters:,} |\n"
        f"| tokens each block feeds forward | {tokens} |"
    )
    rows = measured(name)
    if not rows:
        return f"{text}\n\nIts speed has not been measured."
    lines = [
        f"| {cell} | {over:.2f} | {low:.2f} to {high:.2f} | {share:.2f} |"
        for cell, over, low, high, share in rows
    ]
    return (
        f"{text}\n\nSpeed on DeiT-S, {machine()}, as [Measurements](../measurements.md) says; the "
        "oracle has the same token counts without any scoring:\n\n"
        "| | speed over dense | 95 % interval | share of its oracle |\n| --- | --- | --- | --- |\n"
        + "\n".join(lines)
    )


def _usual(cls: type[Reducer]) -> str:
    """The option one sets first, at its default."""
    default = {f.name: f.default for f in fields(cls)}.get(cls.rate)
    return f", {cls.rate}={default!r}" if default is not None else ""


@lru_cache
def all_pages() -> dict[str, str]:
    """Every page of the section by its address."""
    pages = {f"methods/{name}.md": method_page(name) for name in foveate.list_methods()}
    return {"methods/index.md": index_page(), **pages}


if __name__ == "__main__":
    print(method_page(sys.argv[1]) if sys.argv[1:] else index_page())
