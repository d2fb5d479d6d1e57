"""Draw pictures from models and images: preprocess, run, draw."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from torch import Tensor, nn

from foveate.backbones import backbone_of
from foveate.core import Backbone, ReducedViT, Trace
from foveate.core.evaluation import evaluating
from foveate.core.schedule import check_choice
from foveate.data import ImageFiles, Prepared, Preprocessing
from foveate.dense import Hosting
from foveate.viz.captions import Model, giga, image_cost
from foveate.viz.colours import EXTRA
from foveate.viz.dense import trace_dense
from foveate.viz.grid import Box, Panel, as_image, laid, panel, seen, shrunk
from foveate.viz.layout import Bar, Cell, page
from foveate.viz.relevance import HEATS, heat_map
from foveate.viz.steps import Step, steps
from foveate.viz.tokens import (
    LEFT_OUT,
    MERGED,
    SUMS_UP,
    brought_back,
    depth,
    depth_bar,
    groups,
    kept,
    tinted,
    with_depth,
    with_groups,
)

__all__ = ["KINDS", "SHEETS", "draw", "heat", "sheet"]

_PICTURES: Mapping[str, Callable[..., Image.Image]] = {
    "kept": kept,
    "groups": groups,
    "depth": depth,
    "brought-back": brought_back,
}
KINDS = tuple(_PICTURES)
SHEETS = ("tokens", "depth")
_THUMB = 256  # longer side of an image in a sheet, in pixels


def draw(
    model: Model, image: Any, kind: str = "kept", *, preprocessing: Preprocessing | None = None
) -> Image.Image:
    """Run a reduced model on one image and draw what became of its patches.

    Args:
        model: a model from ``foveate.apply``: a ViT, or a dense backbone, detector or segmenter.
        image: path, PIL image or uint8 pixels.
        kind: "kept", "groups", "depth" or "brought-back".
        preprocessing: how to prepare the image for a ViT; None does what the model expects. A
            dense model takes only None.
    """
    check_choice("kind", kind, KINDS)
    picture = as_image(image)
    trace, box = _run(model, picture, preprocessing)
    return _PICTURES[kind](trace, picture, model=model, box=box)


def heat(
    model: nn.Module,
    image: Any,
    how: str | Sequence[str] | None = None,
    *,
    block: int = -1,
    target: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Image.Image:
    """Draw where the base model looks; each map has its own colour scale.

    Args:
        model: a plain ViT, or a reduced model, whose base model is used.
        image: path, PIL image or uint8 pixels.
        how: "attention", "rollout", "relevance", or several of them. None draws all, but leaves
            relevance out if the model has no head.
        block: the block whose attention is shown.
        target: the class that relevance explains; None is the model's prediction.
        preprocessing: how to prepare the image; None does what the model expects.
    """
    picture, backbone = as_image(image), backbone_of(model)
    prepared = (preprocessing or Preprocessing.of(model))(picture)
    if how is None:
        how = HEATS if backbone.spec.classes else HEATS[:2]
    ways = [how] if isinstance(how, str) else list(how)
    batch = _batch(model, prepared)
    maps = [heat_map(model, batch, way, block=block, target=target)[0] for way in ways]
    grid = (maps[0].shape[0], maps[0].shape[1])
    base = seen(panel(picture, grid, prepared.box, 1 + len(maps)))
    cells = [Cell(base.image(), ["input"])]
    for way, values in zip(ways, maps, strict=True):
        flat = values.flatten().cpu().numpy()
        low, high = float(flat.min()), float(flat.max())
        drawn = tinted(base, (flat - low) / max(high - low, 1e-12))
        words = [_heat_words(way, backbone, block, target), f"{low:.2g} to {high:.2g}"]
        cells.append(Cell(drawn.image(), words))
    title = [f"{backbone.spec.family}: where the model looks without reduction"]
    return page(cells, title, bar=Bar("each map has its own scale", ["least", "most"]))


def _heat_words(how: str, backbone: Backbone, block: int, target: int | None) -> str:
    if how == "rollout":
        return "attention rollout"
    if how == "relevance":
        return f"relevance for {'its prediction' if target is None else f'class {target}'}"
    what = "class attention" if backbone.spec.class_token else "attention received"
    return f"{what}, block {range(backbone.spec.depth)[block]}"


def sheet(
    models: Sequence[Model] | Mapping[str, Model],
    images: Sequence[Any] | Mapping[str, Any] | ImageFiles,
    *,
    kind: str = "tokens",
    preprocessing: Preprocessing | None = None,
) -> Image.Image:
    """Set methods side by side, with a column for each model and a row for each image.

    Args:
        models: reduced models, as ``draw`` takes them; names in a mapping replace the methods as
            heads of columns.
        images: paths, PIL images or uint8 pixels; names in a mapping become names of rows.
            ``ImageFiles`` are read one at a time.
        kind: "tokens" draws the patches that the last block works on: dropped ones are dimmed,
            merged ones have their group's colour. "depth" draws how many blocks worked on each.
        preprocessing: how to prepare images; None does what each model expects.
    """
    check_choice("kind", kind, SHEETS)
    columns, rows = list(_named(models)), _named(images)
    cells: list[Cell] = []
    costs: list[list[tuple[float, float]]] = [[] for _ in columns]  # with and without the method
    extra, depths = False, set()
    for name, image in rows:
        whole = as_image(image)
        picture, _ = shrunk(whole, _THUMB, None)
        for column, (_, model) in enumerate(columns):
            # Dense models see images at their own resolution, which a thumbnail has lost.
            given = whole if isinstance(model, Hosting) else picture
            trace, box = _run(model, given, preprocessing)
            across, down = picture.width / given.width, picture.height / given.height
            box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
            costs[column].append(image_cost(model, trace))
            base = laid(trace, 0, picture, box, 1)
            if not column:
                cells.append(Cell(base.image(), [name] if name else []))
            depths.add(len(trace.blocks))
            last = steps(trace)[-1]
            extra |= last.extra > 0
            cells.append(_sheet_cell(base, trace, last, kind))
    if not cells:
        raise ValueError("a sheet needs at least one model and one image")
    heads: list[list[str]] = [["input"]]
    for (name, model), found in zip(columns, costs, strict=True):
        means = [fmean(values) for values in zip(*found, strict=True)]
        heads.append([name or repr(model.reducer), f"{giga(means[0], means[1])} GMACs"])
    if kind == "depth":
        bar = depth_bar(depths.pop() if len(depths) == 1 else None)
        return page(cells, bar=bar, columns=1 + len(columns), heads=heads)
    legend = [MERGED, LEFT_OUT, *([SUMS_UP] if extra else [])]
    return page(cells, legend=legend, columns=1 + len(columns), heads=heads)


def _sheet_cell(base: Panel, trace: Trace, last: Step, kind: str) -> Cell:
    if kind == "depth":
        drawn, mean = with_depth(base, trace, 0)
        return Cell(drawn.image(), [f"{mean:.1f} of {len(trace.blocks)} blocks per patch"])
    words = f"{last.tokens} tokens, {int(last.working.sum())} of {last.patches} patches"
    return Cell(with_groups(base, last).image(), [words], last.extra, EXTRA)


def _named(given: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values; the name of a path is its last part."""
    if isinstance(given, ImageFiles):
        yield from ((path.name, image) for path, image in given)
    elif isinstance(given, Mapping):
        yield from given.items()
    else:
        for value in given:
            is_path = isinstance(value, (str, os.PathLike))
            yield Path(value).name if is_path else "", value


def _run(
    model: Model, picture: Image.Image, preprocessing: Preprocessing | None
) -> tuple[Trace, Box]:
    """Trace one image with the model in evaluation mode; return what its patches cover too."""
    if isinstance(model, Hosting):
        if preprocessing is not None:
            raise ValueError("a dense model prepares its images itself: leave preprocessing out")
        with evaluating(model):
            return trace_dense(model, picture)
    if not isinstance(model, ReducedViT):
        raise ValueError(f"a model from foveate.apply is needed, got {type(model).__name__}")
    prepared = (preprocessing or Preprocessing.of(model))(picture)
    with evaluating(model):
        return model.trace(_batch(model, prepared)), prepared.box


def _batch(model: nn.Module, prepared: Prepared) -> Tensor:
    """Make a batch of one image, on the model's device and in its precision."""
    return prepared.tensor[None].to(next(model.parameters()))
