"""Make the tasks of fine-tuning and of training a method, with their teachers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from torch import nn

from foveate.backbones import backbone_for, image_settings
from foveate.core import ReducedViT
from foveate.train import recipe as recipes
from foveate.train.budgets import with_method
from foveate.train.finetune import FinetuneTask
from foveate.train.images import ImageTask
from foveate.train.models import open_start, started
from foveate.train.reduce import ReduceTask

__all__ = ["make_finetune", "make_reduce", "make_untaught"]

_log = logging.getLogger(__name__)


def make_finetune(recipe: recipes.Finetune, classes: int) -> FinetuneTask:
    """Make the model and its teacher for fine-tuning."""
    model, new = started(recipe.model, classes)
    teacher = None
    if recipe.distill.kind != "none":
        teacher = _teacher(recipe.distill.teacher, recipe.model, model, classes, new)
    task = FinetuneTask(
        model,
        classes,
        recipe.data,
        recipe.mix,
        masking=recipe.masking,
        distill=recipe.distill,
        teacher=teacher,
    )
    _compare_images(task, teacher)
    return task


def make_reduce(recipe: recipes.Reduce, classes: int, out: Path | None = None) -> ReduceTask:
    """Make the model with its method, and the dense teacher of its losses.

    Args:
        recipe: what to make.
        classes: number of classes of the data.
        out: folder of the run, where the rate that meets a budget is kept.
    """
    model, new = started(recipe.model, classes)
    task = make_untaught(recipe, model, classes, out)
    if task.needs_teacher:
        teacher = _teacher(recipe.teacher, recipe.model, model, classes, new)
        task.learn_from(teacher)
        _compare_images(task, teacher)
    return task


def make_untaught(
    recipe: recipes.Reduce, model: nn.Module, classes: int, out: Path | None = None
) -> ReduceTask:
    """Make the task of a method on a model, without the teacher that it may need."""
    method: Any = recipe.method  # in Python also an object, which keeps its parameters
    return ReduceTask(
        with_method(model, method, recipe, out),
        classes,
        recipe.data,
        recipe.mix,
        weights=recipe.weights,
        token_loss=recipe.token_loss,
    )


def _teacher(
    path: str | None, start: recipes.Model, model: nn.Module, classes: int, new: bool
) -> nn.Module:
    """Return the teacher: another model, or the model before training."""
    if path is None:
        if start.start is None:
            raise ValueError(
                "there is nothing to learn from: the model starts from scratch and no teacher is "
                "named; give one, or set the weights of kl and token to 0"
            )
        if start.multiscale is not None:
            raise ValueError(
                f"{start.origin} cannot teach, model.multiscale changes what it answers: name a "
                "teacher"
            )
        if new:
            raise ValueError(
                f"{start.origin} cannot teach, its head for {classes} classes is new: name a "
                "teacher that was trained for them"
            )
        teacher = copy.deepcopy(model)
    else:
        # A given module may be the model itself, and stays as it is.
        teacher = copy.deepcopy(open_start(path))
    if isinstance(teacher, ReducedViT):
        name = "that was given" if isinstance(path, nn.Module) else path
        raise ValueError(
            f"the teacher {name} has the method {teacher.reducer!r}: a dense model is needed, such "
            "as the vit of a reduced one"
        )
    mine, its = backbone_for(model), backbone_for(teacher)
    facts = (
        ("classes", classes, its.spec.classes),
        ("channels", mine.channels, its.channels),
        ("patches", mine.spec.grid, its.spec.grid),
    )
    for what, wanted, found in facts:
        if wanted != found:
            raise ValueError(
                f"the teacher has {what} {found}, the student {wanted}: they do not fit"
            )
    return teacher


def _compare_images(task: ImageTask, teacher: nn.Module | None) -> None:
    """Warn if the teacher was trained on images that were normalised in another way."""
    if teacher is None:
        return
    known = image_settings(teacher)
    for what in ("mean", "std"):
        mine = getattr(task.inputs, what)
        its = known.get(what, mine)
        if len(its) != len(mine) or any(abs(a - b) > 0.01 for a, b in zip(its, mine, strict=True)):
            _log.warning(
                "the teacher knows images of %s %s and is shown the model's, of %s: it may teach "
                "nonsense",
                *(what, list(its), list(mine)),
            )
