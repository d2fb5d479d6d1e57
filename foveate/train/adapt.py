"""Train a model with a method to answer as it does without it, on images without labels.

The teacher is the model before training, without the method. It sees the same augmented images, and
the model with its method learns to agree with it: in the features of every patch, whatever was
dropped or merged, in its prefix tokens, and in its class probabilities if it has a head. Methods
add their own losses; where these ask for labels they get the teacher's probabilities.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from foveate.backbones import backbone_for
from foveate.core import ReducedViT, dense
from foveate.core.losses import distillation, feature_distance
from foveate.data import Inputs, Splits
from foveate.dense import DenseModel
from foveate.train import recipe as recipes
from foveate.train.budgets import with_method
from foveate.train.draws import Draws
from foveate.train.models import make_model, open_whole
from foveate.train.module import Module
from foveate.train.recipe import Data
from foveate.train.reduce import MethodTask, chosen_weights, own_weights
from foveate.train.result import Result, better_weights, is_better
from foveate.train.run import Loaders, fit, method_callbacks
from foveate.train.splits import check_start, open_data
from foveate.train.task import Task

__all__ = ["AdaptTask", "adapt", "make_adapt"]

_log = logging.getLogger(__name__)
_ELSEWHERE = ("class", "kl", "token")  # a method's own, which labels or the losses here stand for


class AdaptTask(MethodTask):
    """The distances between a model with a method and the same model without it.

    Losses are "patches" and "prefix" (final tokens), "kl" (class probabilities) and the method's
    own. Metrics are "agreement" (the same most likely class, in per cent), "kl" and "cosine" (of
    final patches). The best weights are those with the least divergence, which is a finer measure
    than agreement if images are few; for a model without classes those with the highest cosine.

    Args:
        model: with a method.
        teacher: the same model, driven without a method.
        data: what the recipe says of images.
        blocks: number of last blocks that learn beside the method; None is the whole model.
        weights: weights of losses.
    """

    teacher: ReducedViT

    def __init__(
        self,
        model: ReducedViT,
        teacher: ReducedViT,
        data: Data | None = None,
        *,
        blocks: int | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        backbone = model.backbone
        self.classifies = backbone.classifies
        own = {k: v for k, v in own_weights(model).items() if k not in _ELSEWHERE}
        usual = {"patches": 1.0, **own}
        usual |= {"prefix": 1.0} if backbone.spec.prefix else {}
        usual |= {"kl": 1.0} if self.classifies else {}
        weights = chosen_weights(weights, usual, model.reducer.name)
        super().__init__(model, data, weights=weights, teacher=teacher)
        self.score = "kl" if self.classifies else "cosine"
        self.higher_is_better = not self.classifies
        if blocks is not None:
            _freeze(model, blocks)

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Compute the distances from the teacher, and the method's own losses."""
        images = self.pixels(batch)
        outcome = self.run(images, track=True)
        with torch.no_grad():
            wanted = self.teacher.run(images)
        target, front = wanted.state.tokens(), wanted.state.prefix
        losses = {"patches": feature_distance(outcome.state.restore(), target[:, front:])}
        if front:
            losses["prefix"] = feature_distance(outcome.state.prefix_tokens(), target[:, :front])
        likely = None
        if self.classifies:
            losses["kl"] = distillation(outcome.logits, wanted.logits)
            likely = wanted.logits.float().softmax(-1)
        return losses | self.model.reducer.losses(outcome, likely)

    def metrics(self) -> dict[str, Metric]:
        """Return metrics of agreement with the teacher."""
        names = (*(("agreement", "kl") if self.classifies else ()), "cosine")
        # By default the mean would leave out NaN.
        return {name: MeanMetric(nan_strategy=float("nan")) for name in names}

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        """Compare a batch with the teacher."""
        assert isinstance(model, ReducedViT)
        images = self.pixels(batch)
        outcome, wanted = model.run(images, track=True), self.teacher.run(images)
        patches = wanted.state.tokens()[:, wanted.state.prefix :]
        found = {"cosine": 1 - feature_distance(outcome.state.restore(), patches)}
        if self.classifies:
            same = outcome.logits.argmax(-1) == wanted.logits.argmax(-1)
            found["agreement"] = 100 * same.float().mean()
            found["kl"] = distillation(outcome.logits, wanted.logits)
        for name, value in found.items():
            metrics[name].update(value, weight=len(images))


def _freeze(model: ReducedViT, blocks: int) -> None:
    """Freeze all of a model except its method and its last blocks."""
    own, depth = model.backbone.blocks, model.backbone.spec.depth
    if blocks > depth:
        raise ValueError(f"train=blocks:{blocks}: the model has {depth} blocks")
    free = {id(p) for block in own[depth - blocks :] for p in block.parameters()}
    for parameter in model.vit.parameters():
        if id(parameter) not in free:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{model.reducer.name} has nothing to train on this model: train=method leaves all as "
            "it is, train=blocks:N or train=all trains the model too"
        )


class Before(Callback):
    """Measures the model before its first update, under the names of the metrics and "_before"."""

    def __init__(self, loaders: Loaders) -> None:
        self.loader = loaders.val

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluate as the run's own evaluations do."""
        assert isinstance(module, Module) and self.loader is not None
        if trainer.global_step:  # a run that goes on has its numbers in the checkpoint
            return
        task = module.task
        module.on_validation_start()
        metrics = {name: metric.to(module.device) for name, metric in task.metrics().items()}
        model = task.model.eval()  # the first step sets the modes
        task.set_progress(1.0, model)
        with trainer.precision_plugin.forward_context():
            for number, batch in enumerate(self.loader):
                batch = trainer.strategy.batch_to_device(batch)
                task.validation_step(model, batch, metrics, number)
        module.on_validation_end()
        found = {f"{name}_before": float(metric.compute()) for name, metric in metrics.items()}
        module.watched = {name: round(value, 4) for name, value in found.items()}


# From a recipe ------------------------------------------------------------------------------------


def make_adapt(recipe: recipes.Adapt, out: Path | None = None) -> AdaptTask:
    """Make the model with its method, and its teacher without the method."""
    given = recipe.model
    for name, usual in (("multiscale", None), ("pool", None), ("new_head", False)):
        if getattr(given, name) != usual:
            raise ValueError(
                f"model.{name} changes what the model answers, and here it learns to answer as "
                "before: leave it out"
            )
    opened = open_whole(given)
    if isinstance(opened, DenseModel):
        raise ValueError(
            f"{given.origin} is a detector or segmenter: only classifiers and models without a "
            "head are adapted"
        )
    method: Any = recipe.method  # in Python also an object, which keeps its parameters
    if isinstance(opened, ReducedViT):
        if method is not None:
            raise ValueError(
                f"{given.origin} has its method {opened.reducer!r}: method=null takes it, name no "
                "other"
            )
        method, opened = opened.reducer, opened.vit
    elif method is None:
        raise ValueError(f"{given.origin} has no method: name one, such as method=evit")
    teacher = dense(backbone_for(copy.deepcopy(opened)))
    model: Any = opened
    vit = make_model(replace(given, name=None, options={}, start=model), None)
    its = Inputs.of(vit)  # as the model knows its images, and will be shown them
    augment = replace(recipe.data.augment, interpolation=its.interpolation)
    data = replace(recipe.data, crop_pct=its.crop_pct, augment=augment)
    reduced = with_method(vit, method, recipe, out)
    return AdaptTask(reduced, teacher, data, blocks=recipe.blocks, weights=recipe.weights)


def _build(recipe: recipes.Adapt, out: Path) -> tuple[Task, Splits]:
    check_start(recipe.data, recipe.model.start)
    splits = open_data(recipe.data, labels=False)
    return make_adapt(recipe, out), splits


def _callbacks(recipe: Any, task: Task, loaders: Loaders, out: Path) -> list[Callback]:
    return [Before(loaders), *method_callbacks(recipe, task, loaders, out)]


def adapt(
    recipe: recipes.Adapt,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _log.info,
    again: str | None = None,
) -> Result:
    """Train a model with a method to agree with its dense teacher, and export it.

    Args:
        recipe: what to do.
        out: folder of the run; made if missing.
        resume: go on from the newest checkpoint there that can be read.
        progress: show a progress bar.
        say: is told, before the first step, what is trained on what.
        again: what to type to go on with a run that was stopped; None is --resume and its folder.
    """
    how: dict[str, Any] = {"resume": resume, "progress": progress, "say": say, "again": again}
    result = fit(recipe, out, partial(_build, out=out), callbacks=_callbacks, **how)
    if "model" in result:  # the first of several processes
        _warn_if_worse(result)
    return result


def _warn_if_worse(result: Result) -> None:
    name = result["score"]
    (where, score), before = better_weights(result, result.path), result[f"{name}_before"]
    if not (score == before or is_better(name, score, before)):  # NaN is worse too
        _log.warning(
            "training made the model worse: the weights of %s have a %s of %g, and before training "
            "it was %g; a lower optim.lr may help",
            *(where, "divergence (KL)" if name == "kl" else name, score, before),
        )
