"""Make cells with complete recipes from a pipeline.

OUT/1-pretrain, OUT/2-finetune, ...   the run folders of the stages
OUT/evaluation                        what was measured of their models at the end
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from foveate import config
from foveate.data import final_images
from foveate.measure.cells import EVALUATE, Cell, Key, Work, plain
from foveate.measure.comparison import start_of
from foveate.mim.teacher import check_keeps_teacher
from foveate.registry import suggest
from foveate.stages.check import check
from foveate.stages.recipe import Pipeline, Planned, Stage
from foveate.train.recipe import Data

__all__ = ["EVALUATION", "plan", "planned"]

EVALUATION = "evaluation"


def plan(pipeline: Pipeline, out: Path) -> tuple[list[Planned], Cell]:
    """Return the stages and the evaluation at the end; ValueError if they do not fit together.

    No stage runs before all of them are known to fit together.
    """
    found: list[Planned] = []
    for stage in pipeline.in_order:
        found.append(planned(pipeline, stage, found, out.resolve()))
    check(found, pipeline.evaluate)
    return found, _evaluation(pipeline, found, out.resolve())


# One stage ----------------------------------------------------------------------------------------


def planned(pipeline: Pipeline, stage: Stage, earlier: Sequence[Planned], out: Path) -> Planned:
    """Resolve a stage: its recipe, what all stages share, its own settings, its start."""
    path = None if stage.recipe is None else _file(stage, stage.recipe)
    tree = {} if path is None else config.load(path)
    if stage.job == "reduce" and not (tree.get("method") or stage.settings.get("method")):
        raise ValueError(f"{stage.where} names no method, such as method: dynamicvit(keep=0.7)")
    own = stage.settings
    start, file = _named(stage, own, ("model", "start"), earlier), ""
    if not _says(own, ("model", "start")):
        start = _before(stage, earlier)
    elif start is not None:
        file = start_of(own["model"]["start"])[1]
        if file:
            check_keeps_teacher(start.stage.where, getattr(start.recipe, "method", None))
    teaching = ("distill", "teacher") if stage.job == "finetune" else ("teacher",)
    teacher = _named(stage, own, teaching, earlier)
    for one, what in ((start, "start from"), (teacher, "learn from")):
        if one is not None and one.stage.job == "probe":
            raise ValueError(f"{stage.where} cannot {what} {one.stage.name}, which trains no model")
    changes = [*_flat(pipeline.data, "data.")]
    if stage.job == "pretrain" and "train" in pipeline.data and _reads_its_own(tree):
        changes += _flat({"probe": {"data": pipeline.data["train"]}})
    changes += _flat(pipeline.loop, "loop.") if stage.job != "probe" else []
    changes += _flat(own)
    for setting, one, inside in ((("model", "start"), start, file), (teaching, teacher, "")):
        if one is not None:
            changes.append(f"{'.'.join(setting)}={json.dumps(str(one.cell.folder / inside))}")
    cls = config.recipe_class(stage.job)
    try:
        recipe: Any = config.parse(cls, tree, changes, str(path or stage.where), given=stage.where)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if stage.where in text else f"{stage.where}: {text}") from None
    needs = dict.fromkeys(one.stage.label for one in (start, teacher) if one is not None)
    work = Work(job=stage.job, recipe=plain(recipe))
    key = {"": Key(stage.label)}
    cell = Cell(key, work, stage.label, out / stage.label, tuple(needs))
    return Planned(stage, recipe, start, teacher, cell)


def _reads_its_own(tree: Mapping[str, Any]) -> bool:
    """Tell whether a recipe of pre-training reads its progress curve off its own images."""
    read = tree.get("probe", {}).get("data")
    return read is not None and read == tree.get("data", {}).get("train", Data.train)


def _file(stage: Stage, name: str) -> Path:
    try:
        return config.find_recipe(stage.job, name)
    except ValueError as error:
        raise ValueError(f"{stage.where}: {error}") from None


def _says(tree: Mapping[str, Any], place: Sequence[str]) -> bool:
    """Tell whether nested settings have a key, even with the value null."""
    first, *rest = place
    if not rest:
        return first in tree
    inner = tree.get(first)
    return isinstance(inner, Mapping) and _says(inner, rest)


def _named(
    stage: Stage, tree: Mapping[str, Any], place: Sequence[str], earlier: Sequence[Planned]
) -> Planned | None:
    """Return the earlier stage that a setting names; None for a path that exists."""
    if not _says(tree, place):
        return None
    value: Any = tree
    for key in place:
        value = value[key]
    if value is None or value in ("demo", "pretrained"):
        return None
    named = start_of(str(value))[0] if place[0] == "model" else value
    for one in earlier:
        if named == one.stage.name:
            return one
    if not Path(str(value)).expanduser().exists():
        names = [one.stage.name for one in earlier]
        what = suggest("earlier stage", str(value), names) if names else f"got {value!r}"
        raise ValueError(
            f"{stage.where}: {'.'.join(place)} must name an earlier stage or a file that exists: "
            f"{what}"
        )
    return None


def _before(stage: Stage, earlier: Sequence[Planned]) -> Planned | None:
    """Return the stage that a stage starts from by default; refuse to lose classes or a method."""
    before = next((one for one in reversed(earlier) if one.stage.job != "probe"), None)
    if before is None:
        return None
    name = before.stage.name
    lost = None
    if stage.job == "pretrain" and before.stage.classifies:
        lost = "its classes"
    elif before.stage.job == "reduce" and stage.job != "probe":
        lost = "its method"
    if lost is not None:
        raise ValueError(
            f"{stage.where} is a {stage.job} stage after {name}, a {before.stage.job} one, and "
            f"would lose {lost}: say model.start={name} if that is meant, another stage, or null"
        )
    return before


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Return nested settings as ``key=value``, with values as YAML reads them."""
    # The name of a method and a preset begin their groups anew, so they come first.
    for key, value in sorted(tree.items(), key=lambda item: item[0] not in ("name", "preset")):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump([value], default_flow_style=True, width=10**9)
            yield f"{prefix}{key}={text.strip()[1:-1]}"


# The end ------------------------------------------------------------------------------------------


def _evaluation(pipeline: Pipeline, stages: Sequence[Planned], out: Path) -> Cell:
    """Return the evaluation of all models with classes, on the test images if there are any."""
    judged = [one for one in stages if one.stage.classifies]
    data = judged[0].recipe.data
    spec, split = final_images(data.train, data.val, data.test)
    images: dict[str, Any] = {"data": spec, "split": split}
    if split == "val":
        images |= {"val_share": data.val_share, "split_seed": data.split_seed}
    tuned = tuple(one.stage.label for one in judged if one.stage.job == "finetune")
    methods = {one.stage.label: () for one in judged}
    asked = plain(pipeline.evaluate.plan(**images, methods=methods, only=tuned))
    place = {name: asked.pop(name) for name in ("device", "workers")}
    models = {one.stage.label: str(one.cell.folder) for one in judged}
    keys = {label: Key(label) for label in models}
    work = Work(job=EVALUATE, models=models, asked=asked, **place)
    return Cell(keys, work, EVALUATION, out / EVALUATION, tuple(models))
