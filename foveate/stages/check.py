"""Refuse stages that do not fit together, before any of them runs.

The task of each stage is made as its run will make it, from the model of the stage before and
without memory for weights. So whatever a run refuses is refused here, hours earlier.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate import machine
from foveate.backbones import backbone_for
from foveate.core import ReducedViT
from foveate.data import open_images
from foveate.data.loader import check_batch
from foveate.data.splits import NONE
from foveate.measure import at_rate
from foveate.measure.occlusion import check_ratios
from foveate.mim.build import make_pretrain
from foveate.stages.recipe import Measured, Planned
from foveate.train.build import make_finetune, make_reduce, make_untaught
from foveate.train.models import make_model, make_named, open_start, started, take
from foveate.train.optim import fix_parameters, parameter_groups
from foveate.train.probe import check_reading
from foveate.train.processes import check_loop
from foveate.train.splits import check_start, check_unseen
from foveate.train.task import Task

__all__ = ["check"]

_FACTS = ("width", "depth", "heads", "prefix", "patch", "grid")
_SPLITS = ("train", "val", "test", "val_share", "split_seed")


def check(stages: Sequence[Planned], measured: Measured) -> None:
    """Raise ValueError if any stage, or the evaluation, would refuse to run after the others."""
    if measured.rates and not any(one.stage.job == "reduce" for one in stages):
        raise ValueError("evaluate.rates are for methods, and no stage is a reduce one")
    try:
        machine.device_of(measured.device)
    except ValueError as error:
        raise ValueError(f"evaluate.device: {error}") from None
    classes = _check_data(stages)
    models: dict[str, nn.Module] = {}
    for one in stages:
        try:
            models[one.stage.label] = _checked(one, models, classes, measured)
        except ValueError as error:
            raise ValueError(f"{one.stage.where}: {error}") from error


# Models -------------------------------------------------------------------------------------------


def _checked(
    one: Planned, models: Mapping[str, nn.Module], classes: int, measured: Measured
) -> nn.Module:
    """Make the task of a stage and all that is checked of it, and return the plain model."""
    base, job = _start(one, models), one.stage.job
    recipe = one.recipe
    if base is not None:
        recipe = replace(recipe, model=replace(recipe.model, start=copy.deepcopy(base)))
    if job == "probe":
        with torch.device("meta"):
            model: Any = make_model(recipe.model, None)
        check_reading(recipe, backbone_for(model).spec)
        return model
    check_loop(recipe.loop)
    task = _task(one, recipe, models, classes)
    fix_parameters(task, recipe.optim)
    parameter_groups(task, recipe.optim)
    model = task.model
    if job == "pretrain":
        if recipe.probe.data is not None:
            open_images(recipe.probe.data)
            check_reading(recipe.probe, backbone_for(model.vit).spec, "probe.")
        return model.vit
    if job == "reduce":
        _check_rates(model, measured.rates)
        return model.vit
    if measured.occlusion:
        check_ratios(measured.occlusion, model)
    return model


def _start(one: Planned, models: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the model that a stage starts from, without memory for weights; None from scratch."""
    wanted = one.recipe.model
    plain = replace(wanted, multiscale=None, drop_path=0.0, checkpointing=False)
    if one.start is None:
        if wanted.start is None:
            return None
        if wanted.start == "pretrained":  # the weights are not needed here
            with torch.device("meta"):
                return make_named(replace(plain, start=None), {})
        if wanted.start != "demo" and not Path(wanted.start).expanduser().exists():
            raise ValueError(f"model.start={wanted.start} does not exist")
        if one.stage.job != "pretrain":
            check_start(one.recipe.data, wanted.start)
        return make_model(plain, None).to("meta")
    base = models[one.start.stage.label]
    if wanted.name is None:
        return base
    with torch.device("meta"):
        made = make_named(
            replace(plain, start=None), {"num_classes": backbone_for(base).spec.classes}
        )
    _compare(made, base, f"{wanted.name} has", f"the model of {one.start.stage.name}")
    take(made, base, plain)
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


def _task(one: Planned, recipe: Any, models: Mapping[str, nn.Module], classes: int) -> Task:
    """Make the task of a training stage, without memory for weights."""
    job = one.stage.job
    with torch.device("meta"):
        if job == "pretrain":
            return make_pretrain(recipe)
        if job == "finetune":
            if recipe.distill.kind != "none":
                teacher = _teacher(one, recipe.distill.teacher, models)
                recipe = replace(recipe, distill=replace(recipe.distill, teacher=teacher))
            return make_finetune(recipe, classes)
        model, _ = started(copy.deepcopy(recipe.model), classes)
        if make_untaught(recipe, model, classes).needs_teacher:
            recipe = replace(recipe, teacher=_teacher(one, recipe.teacher, models))
        return make_reduce(recipe, classes)


def _teacher(one: Planned, given: str | None, models: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the teacher that a stage names; refuse one without classes."""
    name, job = one.stage.name, one.stage.job
    if one.teacher is not None:
        if one.teacher.stage.job != "finetune":
            raise ValueError(
                f"{one.teacher.stage.name} cannot teach, it is a {one.teacher.stage.job} stage: "
                "name a finetune one"
            )
        return models[one.teacher.stage.label]
    if given is not None:
        if not Path(given).expanduser().exists() and given != "demo":
            raise ValueError(
                f"the teacher {given} of recipe {one.stage.recipe} does not exist: name an earlier "
                "stage, or null for the start of the stage"
            )
        with torch.device("cpu"):
            return open_start(given).to("meta")
    if one.recipe.model.start is None:
        raise ValueError("nothing can teach a model that starts from scratch: name a teacher")
    if one.start is not None and not one.start.stage.classifies:
        raise ValueError(
            f"{one.start.stage.name} has no classes and cannot teach {name}, a {job} stage that "
            "starts from it: put a finetune stage between them, or name a teacher"
        )
    return None


def _check_rates(model: ReducedViT, rates: Sequence[float]) -> None:
    """Refuse rates of the evaluation that the method cannot have."""
    for rate in rates:
        try:
            at_rate(model, None, rate)
        except ValueError as error:
            raise ValueError(f"evaluate.rates: {error}") from None


# Images -------------------------------------------------------------------------------------------


def _check_data(stages: Sequence[Planned]) -> int:
    """Refuse images that differ between stages, and training on images that judge a model.

    Returns:
        The number of classes.
    """
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
    images = open_images(first.recipe.data.train)  # refuses images without labels
    for one in stages:
        if one.stage.job != "probe":
            known = one.recipe.data.train == first.recipe.data.train
            _check_batch(one, len(images) if known else None)
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
    return len(images.classes or ())


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
