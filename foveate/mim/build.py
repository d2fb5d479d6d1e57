"""Make a method on its ViT from a recipe, and refuse what does not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from foveate.backbones import backbone_for
from foveate.data import Splits
from foveate.mim.method import MaskedImageModel, make_method
from foveate.mim.recipe import Pretrain
from foveate.mim.task import PretrainTask
from foveate.mim.teacher import TaughtModel
from foveate.mim.weights import load_rest, load_weights, method_of, rest_path
from foveate.train.models import make_model
from foveate.train.probe import Watched
from foveate.train.recipe import Data, Model
from foveate.train.splits import open_data

_log = logging.getLogger(__name__)

__all__ = ["build", "make_masked_model", "open_watched"]


def make_masked_model(recipe: Pretrain) -> MaskedImageModel:
    """Make the method on a ViT without a head, with new weights or those of a start.

    Files of an earlier run or of ``foveate convert --pretraining`` bring the method's own weights
    too; any other start is only a ViT, and decoder or head get new weights.
    """
    start = recipe.model.start
    path = _both(Path(start)) if isinstance(start, str) else None
    if path is not None and (method := method_of(path)) != recipe.method:
        _log.warning("%s was pre-trained by %s: of that the ViT alone is taken", start, method)
        path = None
    if path is not None and recipe.model.name is not None:
        model = _new(replace(recipe.model, start=None), recipe)
        load_weights(model, path)
        return model
    model = _new(recipe.model, recipe)
    before = {name: value.clone() for name, value in model.vit.state_dict().items()}
    model.initialise()
    if start is not None:
        model.vit.load_state_dict(before)
    if path is not None:  # the ViT was opened as what it is
        load_rest(model, path)
    return model


def _new(model: Model, recipe: Pretrain) -> MaskedImageModel:
    vit: Any = make_model(model, None)
    if getattr(vit, "num_classes", 0):
        vit.reset_classifier(0)
    return make_method(recipe.method, vit, recipe.options)


def _both(path: Path) -> Path | None:
    """Return the backbone's file if the rest of a pre-training lies beside it, else None."""
    path = path / "model.safetensors" if path.is_dir() else path
    return path if path.suffix == ".safetensors" and rest_path(path).is_file() else None


def build(recipe: Pretrain) -> tuple[PretrainTask, Splits]:
    """Make the task and open its images, which need no labels."""
    splits = open_data(recipe.data, labels=False)
    model = make_masked_model(recipe)
    if recipe.loop.eval_mode and isinstance(model, TaughtModel) and model.teacher_trains:
        raise ValueError(
            f"loop.eval_mode=true keeps the batch norms of {model.name} from seeing the batch: "
            "leave it false"
        )
    task = PretrainTask(
        *(model, recipe.mask, recipe.mto, recipe.loop.seed, recipe.data, recipe.loop.epochs)
    )
    return task, splits


def open_watched(recipe: Pretrain, vit: nn.Module) -> Watched | None:
    """Open the labelled images of the progress curve, as evaluation sees them."""
    if recipe.probe.data is None:
        return None
    data = recipe.data
    watched = Data(
        train=recipe.probe.data,
        val_share=data.val_share,  # of the same set, what pre-training holds out too
        split_seed=data.split_seed,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        augment=data.augment,
        batch=recipe.probe.image_batch,
        workers=data.workers,
        limit=recipe.probe.limit,
        val_limit=recipe.probe.val_limit,
    )
    splits = open_data(watched)
    assert splits.val is not None
    found = Watched.of(vit, watched, splits.train, splits.val)
    # What would be found out at the first reading, after hours, is said now.
    if recipe.probe.feature == "token" and not backbone_for(vit).spec.class_token:
        raise ValueError(
            "probe.feature=token needs a class token, which this model has not: use avg"
        )
    if recipe.probe.neighbours > found.train.images:
        raise ValueError(
            f"probe.neighbours={recipe.probe.neighbours} is more than the {found.train.images} "
            f"images of {recipe.probe.data} that are read"
        )
    return found
