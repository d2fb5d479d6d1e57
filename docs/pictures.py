"""Pictures that the documentation draws itself: what a method does to the patch grid, and speed.

``method_picture`` runs a method on a small ViT with random weights and draws the trace, so what is
kept means nothing and how many, where and what becomes of the others is exact.
"""

from __future__ import annotations

import csv
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

import foveate
from foveate.core import TokenState

__all__ = ["method_picture", "measured", "speed_plot", "speed_table"]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SIDE = 14  # patches
LEVELS = 9  # shades of the image
PANELS = 5  # at most, beside the image itself
CELL, GAP, HEAD = 10, 26, 24  # pixels

# A method ----------------------------------------------------------------------------------------


def method_picture(name: str) -> str:
    """One grid for each of some blocks in which the method acts, as an SVG element."""
    model, image = _model(name), _image()
    trace = model.trace(image)
    blocks = _spread(
        sorted({block for part in model.reducer.members for block in part.active_blocks})
    )
    shades = _shades(image)
    everything = torch.arange(SIDE * SIDE)
    panels = [_panel("the image", shades, everything, torch.full_like(everything, 2))]
    late = model.reducer.hooks == ("after",)
    for block in blocks:
        record = trace.blocks[block]
        state = record.output if late else record.mlp
        token, kind = _patches(state)
        title = f"{'after ' * late}block {block}: {state.layout.lengths[0]}"
        panels.append(_panel(title, shades, token, kind))
    step = SIDE * CELL + GAP
    width, height = len(panels) * step - GAP, SIDE * CELL + HEAD
    body = "".join(
        f'<g transform="translate({number * step} {HEAD})">{panel}</g>'
        for number, panel in enumerate(panels)
    )
    return (
        f'<svg class="grids" viewBox="0 -2 {width} {height + 4}" width="{width}" role="img" '
        f'aria-label="Patches that {name} works on, block by block" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def _model(name: str) -> foveate.core.ReducedViT:
    """The method on a small ViT of random weights."""
    torch.manual_seed(3)
    vit = VisionTransformer(embed_dim=96, depth=12, num_heads=3, num_classes=10).eval()
    with torch.no_grad():
        # Patches of like content should be treated alike, so that groups are easy to see.
        vit.pos_embed.zero_()
        for block in vit.blocks:
            block.attn.qkv.weight[:192].mul_(12)
    model = foveate.apply(vit, name, check=False).eval()
    images = _image()
    for part in model.reducer.members:
        _balance(part, model, images)
    return model


def _balance(part: Any, model: foveate.core.ReducedViT, images: Tensor) -> None:
    """Shift gates that nobody trained, stage by stage, until they keep their target share."""
    if part.fixed_count or not part.gated:
        return
    last = [m for m in part.modules() if _ends_in_two(m)]
    for layer in last:
        with torch.no_grad():
            layer.weight.mul_(100)  # apart by more than rounding
    for stage, block in enumerate(part.active_blocks):
        layers = last[
            stage * len(last) // len(part.active_blocks) : (stage + 1)
            * len(last)
            // len(part.active_blocks)
        ]
        goal = part.target(stage) if hasattr(part, "target") else part.schedule.share(stage)
        low, high = -20.0, 20.0
        for _ in range(24):
            middle = (low + high) / 2
            for layer in layers:
                with torch.no_grad():
                    layer.bias.zero_()
                    layer.bias[..., 0] = middle
            kept = model.trace(images).blocks[block].active().float().mean()
            if abs(kept - goal) < 0.01:
                break
            low, high = (low, middle) if kept > goal else (middle, high)


def _ends_in_two(module: torch.nn.Module) -> bool:
    bias = getattr(module, "bias", None)
    return isinstance(bias, Tensor) and bias.shape[-1] == 2


@lru_cache
def _image() -> Tensor:
    """Two soft spots on a slope, ``[1, 3, 224, 224]``."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 224)] * 2, indexing="ij")
    first = torch.exp(-((x + 0.35) ** 2 + (y - 0.1) ** 2) / 0.12)
    second = torch.exp(-((x - 0.55) ** 2 + (y + 0.5) ** 2) / 0.05)
    slope = 0.15 * (x - y)
    return torch.stack([first + slope, second + slope, first - second])[None]


def _shades(image: Tensor) -> Tensor:
    """Shade of every patch, 0 to LEVELS - 1."""
    light = torch.nn.functional.adaptive_avg_pool2d(image[:, :2].sum(1), SIDE).flatten()
    light = (light - light.min()) / (light.max() - light.min())
    return (light * (LEVELS - 1)).round().long()


def _spread(blocks: list[int]) -> list[int]:
    """Some of the blocks, evenly, with the first and the last."""
    if len(blocks) <= PANELS:
        return blocks
    return [blocks[round(i * (len(blocks) - 1) / (PANELS - 1))] for i in range(PANELS)]


def _patches(state: TokenState) -> tuple[Tensor, Tensor]:
    """Which token carries each patch, and how: 2 worked on, 1 waiting, 0 gone."""
    assert state.source is not None
    kind = 2 * (state.source[0] >= 0).long()
    if state.parked is not None and state.parked.state.source is not None:
        waiting = (kind == 0) & (state.parked.state.source[0] >= 0)
        kind[waiting] = 1
    return state.source[0], kind


def _panel(title: str, shades: Tensor, token: Tensor, kind: Tensor) -> str:
    """A grid: cells by shade and kind, and a line wherever neighbours differ in their token."""
    parts = [f'<text x="0" y="-9">{title}</text>']
    own = torch.zeros(len(token) + 2, dtype=torch.long).index_add(
        0, token.clamp_min(0), torch.ones_like(token)
    )
    light = torch.zeros(len(own)).index_add(0, token.clamp_min(0), shades.float())
    for carried in (1, 2):
        for level in range(LEVELS):
            mean = shades
            if carried == 2:  # a merged group has one value
                mean = (light / own.clamp_min(1))[token.clamp_min(0)].round().long()
            cells = ((kind == carried) & (mean == level)).nonzero().flatten().tolist()
            if cells:
                path = "".join(
                    f"M{c % SIDE * CELL} {c // SIDE * CELL}h{CELL}v{CELL}h-{CELL}z" for c in cells
                )
                waiting = " waiting" if carried == 1 else ""
                parts.append(f'<path class="s{level}{waiting}" d="{path}"/>')
    lines = []
    grid, alive = token.view(SIDE, SIDE), kind.view(SIDE, SIDE)
    for row in range(SIDE):
        for column in range(SIDE):
            x, y = column * CELL, row * CELL
            if column + 1 < SIDE and _apart(grid, alive, (row, column), (row, column + 1)):
                lines.append(f"M{x + CELL} {y}v{CELL}")
            if row + 1 < SIDE and _apart(grid, alive, (row, column), (row + 1, column)):
                lines.append(f"M{x} {y + CELL}h{CELL}")
    parts.append(f'<path class="lines" d="{"".join(lines)}"/>')
    parts.append(f'<rect class="frame" width="{SIDE * CELL}" height="{SIDE * CELL}"/>')
    return "".join(parts)


def _apart(grid: Tensor, kind: Tensor, a: tuple[int, int], b: tuple[int, int]) -> bool:
    both_worked_on = kind[a] == kind[b] == 2
    return not both_worked_on or bool(grid[a] != grid[b])


# Speed -------------------------------------------------------------------------------------------

# Names of the benchmark's rows that are not those of methods, and what is not shown.
SPEED_NAMES = {"svit-topk": 'svit(gate="topk")'}
PER_IMAGE = ("ats", "svit", "spvit")
COLOURS = {
    "evit": "#1f9e89",
    "attention": "#6b8e23",
    "dynamicvit": "#2f78c4",
    "tokenmergence": "#8e5bb5",
    "tome": "#e07b00",
    "svit-topk": "#c2407e",
    "ats": "#d1495b",
    "svit": "#8c8c8c",
    "spvit": "#a9744f",
}


@lru_cache
def cells() -> list[dict[str, Any]]:
    """Every cell (dtype, batch, compiled or not) that was measured, from all result files."""
    found = []
    for path in sorted(RESULTS.glob("speed_*.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        numbers: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
        with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["part"] == "speed":
                    key = row["run"], int(float(row["at"]))
                    values = numbers.setdefault(key, {}).setdefault(row["method"], {})
                    values[row["metric"]] = float(row["value"])
        for (run, batch), rows in numbers.items():
            model, dtype, *compiled = run.split(", ")
            cell = {"dtype": dtype, "batch": batch, "compiled": bool(compiled), "rows": rows}
            if model == "deit_s":
                found.append({**cell, "machine": about["machine"]})
    return sorted(found, key=lambda cell: (cell["compiled"], cell["dtype"], cell["batch"]))


def measured(name: str) -> list[tuple[str, float, float, float, float]]:
    """A method's measurements: cell, speed over dense, its interval, share of the oracle."""
    rows = []
    for cell in cells():
        row = cell["rows"].get(name)
        if row is not None:
            over = (row["times"], row["times_low"], row["times_high"])
            rows.append((_cell_name(cell), *over, row["share"]))
    return rows


def _cell_name(cell: dict[str, Any]) -> str:
    return f"{cell['dtype']}, batch {cell['batch']}" + (", compiled" * cell["compiled"])


def machine() -> str:
    """The machine of the measurements, in words."""
    found = {
        f"{m['threads']} threads of an {m['cpu']}, torch {m['torch'].split('+')[0]}, "
        f"timm {m['timm']}"
        for m in (cell["machine"] for cell in cells())
    }
    return "; ".join(sorted(found))


def speed_table() -> str:
    """Speed over dense with its interval, every method in every cell, as Markdown."""
    columns = cells()
    lines = [
        "| | " + " | ".join(_cell_name(cell) for cell in columns) + " |",
        "| --- |" + " --- |" * len(columns),
        "| noise (A/A) | "
        + " | ".join(f"{100 * cell['rows']['']['spread']:.1f} %" for cell in columns)
        + " |",
    ]
    for name in COLOURS:
        entries = []
        for cell in columns:
            row = cell["rows"].get(name)
            entries.append(
                f"{row['times']:.2f}<br><small>{row['times_low']:.2f} to "
                f"{row['times_high']:.2f}</small>"
                if row
                else "-"
            )
        lines.append(f"| `{SPEED_NAMES.get(name, name)}` | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def speed_plot(dark: bool) -> str:
    """Speed over dense against batch, as an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    ink = "#d5d9e0" if dark else "#30343b"
    settings = {
        "svg.hashsalt": "foveate",  # the same file every time
        "font.size": 10,
        "text.color": ink,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    eager = [cell for cell in cells() if not cell["compiled"]]
    dtypes = sorted({cell["dtype"] for cell in eager})
    with matplotlib.rc_context(settings):
        figure, all_axes = pyplot.subplots(1, len(dtypes), figsize=(8, 4), sharey=True)
        for axes, dtype in zip(all_axes, dtypes, strict=True):
            _speed_axes(axes, [cell for cell in eager if cell["dtype"] == dtype], ink)
            axes.set_title(dtype, fontsize=11)
        all_axes[0].set_ylabel("speed over the fused dense model")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="center right", frameon=False, fontsize=9, labelspacing=0.7
        )
        figure.tight_layout(rect=(0, 0, 0.81, 1))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return file.getvalue()


def _speed_axes(axes: Any, columns: list[dict[str, Any]], ink: str) -> None:
    """One precision: a group of points with intervals at each batch size."""
    for number, name in enumerate(COLOURS):
        x, y, below, above = [], [], [], []
        for place, cell in enumerate(columns):
            row = cell["rows"].get(name)
            if row is None:
                continue
            x.append(place + (number - len(COLOURS) / 2 + 0.5) * 0.075)
            y.append(row["times"])
            below.append(row["times"] - row["times_low"])
            above.append(row["times_high"] - row["times"])
        varies = name in PER_IMAGE
        axes.errorbar(
            x,
            y,
            yerr=(below, above),
            label=SPEED_NAMES.get(name, name) + (" *" if varies else ""),
            color=COLOURS[name],
            marker="D" if varies else "o",
            markersize=4,
            linestyle="none",
            elinewidth=1.4,
        )
    for place, cell in enumerate(columns):
        spread = cell["rows"][""]["spread"]
        axes.fill_between(
            (place - 0.42, place + 0.42), 1 - spread, 1 + spread, color=ink, alpha=0.18, lw=0
        )
    axes.axhline(1, color=ink, lw=0.8)
    axes.grid(axis="y", color=ink, alpha=0.15, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xticks(range(len(columns)), [str(cell["batch"]) for cell in columns])
    axes.set_xlabel("batch")
