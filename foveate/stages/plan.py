"""Make cells with complete recipes from a pipeline, and refuse contradictions.

OUT/1-pretrain, OUT/2-finetune, ...   the run folders of the stages
OUT/evaluation                        what was measured of their models at the end
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from foveate import api, config
from foveate.backbones import backbone_for
from foveate.core import ReducedViT
from foveate.data import final_images, open_images
from foveate.data.loader import check_batch
from foveate.data.splits import NONE
from foveate.measure import at_rate
from foveate.measure.cells import EVALUATE, Cell, Key, Work, plain
from foveate.measure.occlusion import check_ratios
from foveate.registry import suggest
from foveate.stages.recipe import Measured, Pipeline, Stage
from foveate.train.models import make_model, open_start
from foveate.train.reduce import ReduceTask
from foveate.train.splits import check_unseen

__all__ = ["EVALUATION", "Planned", "plan"]

EVALUATION = "evaluation"
_FACTS = ("width", "depth", "heads", "prefix", "patch", "grid")
_SPLITS = ("train", "val", "test", "val_share", "split_seed")


@dataclass(frozen=True)
class Planned:
    """A stage, ready to run.

    Attributes:
        stage: the stage of the pipeline.
        recipe: complete recipe of its job.
        start: stage whose model it starts from; None if it starts from elsewhere.
        teacher: stage whose model teaches; None if there is no such stage.
        cell: the same stage as a cell.
    """

    stage: Stage
    recipe: Any
    start: Planned | None
    teacher: Planned | None
    cell: Cell


def plan(pipeline: Pipeline, out: Path) -> tuple[list[Planned], Cell]:
    """Return the stages and the evaluation at the end; ValueError if they do not fit together.

    No stage runs before all of them are known to fit together: each model is built without
    memory for its weights, and the images that everything is judged by are opened.
    """
    found: list[Planned] = []
    for stage in pipeline.in_order:
        found.append(_planned(pipeline, stage, found, out.resolve()))
    _check_models(found, pipeline.evaluate)
    _check_data(found)
    return found, _evaluation(pipeline, found, out.resolve())


# One stage ----------------------------------------------------------------------------------------


def _planned(pipeline: Pipeline, stage: Stage, earlier: Sequence[Planned], out: Path) -> Planned:
    """Resolve a stage: its recipe, what all stages share, its own settings, its start."""
    path = None if stage.recipe is None else _file(stage, stage.recipe)
    tree = {} if path is None else config.load(path)
    if stage.job == "reduce" and not (tree.get("method") or stage.settings.get("method")):
        raise ValueError(f"{stage.where} names no method, such as method: dynamicvit(keep=0.7)")
    own = stage.settings
    start = _named(stage, own, ("model", "start"), earlier)
    if not _says(own, ("model", "start")):
        start = _before(stage, earlier)
    teaching = ("distill", "teacher") if stage.job == "finetune" else ("teacher",)
    teacher = _named(stage, own, teaching, earlier)
    for one, what in ((start, "start from"), (teacher, "learn from")):
        if one is not None and one.stage.job == "probe":
            raise ValueError(f"{stage.where} cannot {what} {one.stage.name}, which trains no model")
    changes = [*_flat(pipeline.data, "data.")]
    changes += _flat(pipeline.loop, "loop.") if stage.job != "probe" else []
    changes += _flat(own)
    for setting, one in ((("model", "start"), start), (teaching, teacher)):
        if one is not None:
            changes.append(f"{'.'.join(setting)}={json.dumps(str(one.cell.folder))}")
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
    for one in earlier:
        if value == one.stage.name:
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


# What contradicts itself --------------------------------------------------------------------------


def _check_models(stages: Sequence[Planned], measured: Measured) -> None:
    """Refuse models, methods and teachers that do not fit what comes before them."""
    models: dict[str, nn.Module] = {}
    if measured.rates and not any(one.stage.job == "reduce" for one in stages):
        raise ValueError("evaluate.rates are for methods, and no stage is a reduce one")
    for one in stages:
        try:
            models[one.stage.label] = model = _model(one, models)
            if one.stage.job == "finetune" and measured.occlusion:
                check_ratios(measured.occlusion, model)
            if one.stage.job == "finetune" and one.recipe.distill.kind != "none":
                _check_teacher(one, one.recipe.distill.teacher)
            if one.stage.job == "reduce":
                _check_method(one, model, measured.rates)
        except ValueError as error:
            raise ValueError(f"{one.stage.where}: {error}") from error


def _model(one: Planned, models: Mapping[str, nn.Module]) -> nn.Module:
    """Return the plain model of a stage, without memory if it can be made by name."""
    wanted = one.recipe.model
    base = None if one.start is None else models[one.start.stage.label]
    if one.start is None and wanted.start not in (None, "demo", "pretrained"):
        if not Path(wanted.start).expanduser().exists():
            raise ValueError(f"model.start={wanted.start} does not exist")
    if wanted.name is None:
        if base is not None:
            return base
        opened = open_start(wanted.start, wanted.weights)
        return opened.vit if isinstance(opened, ReducedViT) else opened
    with torch.device("meta"):
        made = make_model(replace(wanted, start=None, drop_path=0.0, checkpointing=False), 2)
    if base is not None:
        assert one.start is not None
        _compare(made, base, f"{wanted.name} has", f"the model of {one.start.stage.name}")
    return made


def _compare(made: nn.Module, base: nn.Module, mine: str, theirs: str) -> None:
    new, old = backbone_for(made), backbone_for(base)
    facts = [(name, getattr(new.spec, name), getattr(old.spec, name)) for name in _FACTS]
    facts.append(("channels", new.channels, old.channels))
    for name, a, b in facts:
        if a != b:
            raise ValueError(
                f"{mine} {name} {a} and {theirs} {b}: leave model.name out, or give the same "
                "model.options"
            )


def _check_method(one: Planned, model: nn.Module, rates: Sequence[float]) -> None:
    """Put the method on the model, at each of the rates that it will be evaluated at."""
    recipe = one.recipe
    reduced = api.apply(model, recipe.method, check=False)
    for rate in rates:
        try:
            at_rate(reduced, None, rate)
        except ValueError as error:
            raise ValueError(f"evaluate.rates: {error}") from None
    task = ReduceTask(reduced, 2, recipe.data, weights=recipe.weights, token_loss=recipe.token_loss)
    if task.needs_teacher:
        _check_teacher(one, recipe.teacher)


def _check_teacher(one: Planned, given: str | None) -> None:
    """Refuse a teacher without classes, or with a method."""
    if one.teacher is None and given is not None:
        if not Path(given).expanduser().exists() and given != "demo":
            raise ValueError(
                f"the teacher {given} of recipe {one.stage.recipe} does not exist: name an earlier "
                "stage, or null for the start of the stage"
            )
        return
    name, job = one.stage.name, one.stage.job
    if one.teacher is not None:
        if one.teacher.stage.job != "finetune":
            raise ValueError(
                f"{one.teacher.stage.name} cannot teach, it is a {one.teacher.stage.job} stage: "
                "name a finetune one"
            )
    elif one.recipe.model.start is None:
        raise ValueError("nothing can teach a model that starts from scratch: name a teacher")
    elif one.start is not None and not one.start.stage.classifies:
        raise ValueError(
            f"{one.start.stage.name} has no classes and cannot teach {name}, a {job} stage that "
            "starts from it: put a finetune stage between them, or name a teacher"
        )


def _check_data(stages: Sequence[Planned]) -> None:
    """Refuse images that differ between stages, and training on images that judge a model."""
    labelled = [one for one in stages if one.stage.job != "pretrain"]
    first = labelled[0]
    for one in labelled:
        if one.recipe.data.val == NONE:
            raise ValueError(f"{one.stage.where}: data.val=none is for pre-training alone")
        for name in _SPLITS:
            mine, its = getattr(one.recipe.data, name), getattr(first.recipe.data, name)
            if mine != its:
                raise ValueError(
                    f"{one.stage.where} has data.{name}={mine} and {first.stage.where} {its}: one "
                    "pipeline has the same labelled images in all stages, said once in data"
                )
    images = len(open_images(first.recipe.data.train))  # refuses images without labels
    for one in stages:
        if one.stage.job != "probe":
            known = one.recipe.data.train == first.recipe.data.train
            _check_batch(one, images if known else None)
        if one.stage.job == "pretrain":
            seen, judged = one.recipe.data, first.recipe.data
            check_unseen(seen, one.stage.where, judged, first.stage.where)
        for name in ("mean", "std") if one.start is not None else ():
            assert one.start is not None
            mine, its = (getattr(each.recipe.data, name) for each in (one, one.start))
            if mine is not None and its is not None and tuple(mine) != tuple(its):
                raise ValueError(
                    f"{one.stage.where} has data.{name}={list(mine)} and {one.start.stage.where}, "
                    f"which it starts from, {list(its)}: they must be the same"
                )


def _check_batch(one: Planned, images: int | None) -> None:
    """Refuse a batch that the training images cannot fill; the run would, but hours later.

    Args:
        one: the stage.
        images: number of images before some are held out; None if it is not known yet.
    """
    data = one.recipe.data
    there = [count for count in (images, data.limit) if count is not None]
    try:
        check_batch(data.batch, min(there, default=data.batch))
    except ValueError as error:
        raise ValueError(f"{one.stage.where}: {error}") from None


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
