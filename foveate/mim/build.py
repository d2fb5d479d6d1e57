"""Make the task of a pre-training and its data from a recipe, and refuse what does not fit."""

from __future__ import annotations

from torch import nn

from foveate.backbones import backbone_for
from foveate.data import Splits
from foveate.mim.models import make_masked_model
from foveate.mim.recipe import Pretrain
from foveate.mim.task import PretrainTask
from foveate.mim.teacher import TaughtModel
from foveate.train.probe import Watched, check_reading
from foveate.train.recipe import Data
from foveate.train.splits import open_data

__all__ = ["build", "make_pretrain", "open_watched"]


def build(recipe: Pretrain) -> tuple[PretrainTask, Splits]:
    """Make the task and open its images, which need no labels."""
    splits = open_data(recipe.data, labels=False)
    return make_pretrain(recipe), splits


def make_pretrain(recipe: Pretrain) -> PretrainTask:
    """Make the model and its teacher for pre-training."""
    model = make_masked_model(recipe)
    if recipe.loop.eval_mode and isinstance(model, TaughtModel) and model.teacher_trains:
        raise ValueError(
            f"loop.eval_mode=true keeps the batch norms of {model.name} from seeing the batch: "
            "leave it false"
        )
    return PretrainTask(
        *(model, recipe.mask, recipe.mto, recipe.loop.seed, recipe.data, recipe.loop.epochs)
    )


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
    check_reading(recipe.probe, backbone_for(vit).spec, "probe.")
    if recipe.probe.neighbours > found.train.images:
        raise ValueError(
            f"probe.neighbours={recipe.probe.neighbours} is more than the {found.train.images} "
            f"images of {recipe.probe.data} that are read"
        )
    return found
