"""From a recipe to a model, a teacher and batches; all that can be wrong is said here."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import timm
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn

from foveate import api
from foveate.backbones import backbone_for, lvvit_m, lvvit_s, set_image_settings
from foveate.convert import Settings, open_model
from foveate.core import Backbone, ReducedViT
from foveate.data import (
    Loader,
    Preprocessing,
    Splits,
    eval_transform,
    open_splits,
    train_transform,
)
from foveate.data.demo import demo_vit
from foveate.data.splits import NONE
from foveate.train import recipe as recipes
from foveate.train.finetune import FinetuneTask
from foveate.train.reduce import ReduceTask, own_weights

__all__ = [
    "Batches",
    "make_batches",
    "make_finetune",
    "make_model",
    "make_reduce",
    "open_data",
    "open_start",
]

_log = logging.getLogger(__name__)
_OURS = {"lvvit_s": lvvit_s, "lvvit_m": lvvit_m}


@dataclass
class Batches:
    """Loaders of both parts, and what the data say of themselves.

    Attributes:
        splits: the images themselves.
        train: training batches.
        val: validation batches; None where ``data.val`` is "none".
        classes: names; none without labels.
        mean: of each channel.
        std: of each channel.
    """

    splits: Splits
    train: Loader
    val: Loader | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_model(recipe: recipes.Model, classes: int | None) -> nn.Module:
    """The plain model a run starts from, with a head for so many classes; None takes its own."""
    return _started(recipe, classes)[0]


def _started(recipe: recipes.Model, classes: int | None) -> tuple[nn.Module, bool]:
    """The model, and whether its head has learnt nothing yet."""
    if recipe.start is None:
        model = _made(recipe, {"num_classes": classes or 0})
    elif recipe.start == "pretrained":  # with its own head, so that another one is asked for
        model = _made(recipe, {"num_classes": 0} if classes is None else {})
    else:
        model = _opened(recipe)
    new = recipe.start is None
    if classes is not None:
        new |= _give_head(model, recipe, classes)
    if recipe.drop_path:
        _set_drop_path(backbone_for(model), recipe.drop_path)
    if recipe.checkpointing:
        _checkpoint(model)
    return model, new


def open_start(path: str, weights: str = "auto") -> nn.Module:
    """Open weights to start from or to learn from: a file, a folder of any kind, or "demo"."""
    if path == "demo":
        return demo_vit()
    return open_model(path, None, None, {}, Settings(weights=weights)).model


def open_data(data: recipes.Data, *, labels: bool = True) -> Splits:
    """Open the images that a recipe names, and check that no two splits share any."""
    if labels and data.val == NONE:
        raise ValueError("data.val=none is for pre-training: this job chooses by validation images")
    splits = open_splits(
        data.train,
        data.val,
        data.test,
        share=data.val_share,
        seed=data.split_seed,
        allowed=data.overlap,
        labels=labels,
    )
    classes = splits.train.classes
    if labels and classes is None:
        raise ValueError(f"{data.train} has no labels, which this job needs")
    if classes is not None and len(classes) < 2:
        raise ValueError(f"{data.train} has the class {classes[0]} alone: two are needed at least")
    if splits.held_out is not None and classes is not None:
        left = {splits.train.label(i) for i in range(len(splits.train))}
        lost = [name for number, name in enumerate(classes) if number not in left]
        if lost:
            _log.warning(
                "the division leaves no training image of %s: another data.split_seed may",
                ", ".join(lost),
            )
    return splits


def make_batches(
    data: recipes.Data,
    model: nn.Module,
    *,
    splits: Splits | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    augmented: bool = True,
    labels: bool = True,
    final: bool = False,
) -> Batches:
    """Open the data and cut them into batches of what the model takes.

    Args:
        data: from the recipe.
        model: is told the data's mean and spread, which are exported with it.
        splits: the images, if they are open already: listing many takes minutes.
        seed: of order and augmentation.
        rank: number of this process.
        world: how many there are.
        augmented: False gives training images as evaluation sees them, all of them, in order.
        labels: False for jobs that need none.
        final: take the test images in place of those for validation, if there are any: for a last
            look, after which nothing is chosen.
    """
    if splits is None:
        splits = open_data(data, labels=labels)
    backbone = backbone_for(model)
    wanted = Preprocessing.of(model)
    rows, columns = backbone.spec.grid
    size = (rows * backbone.spec.patch[0], columns * backbone.spec.patch[1])
    channels = backbone.channels
    if data.mean is not None and {len(data.mean), len(data.std or ())} != {channels}:
        raise ValueError(
            f"data.mean and data.std need one value for each of the model's {channels} channels"
        )
    mean, std = data.mean or wanted.mean, data.std or wanted.std
    said = {"mean": mean, "std": std, "crop_pct": data.crop_pct}
    said["interpolation"] = data.augment.interpolation
    set_image_settings(model, said)  # exported with the model
    shared: dict[str, Any] = {
        "workers": data.workers,
        "rank": rank,
        "world": world,
        "corrupt": data.corrupt,
    }
    plain = eval_transform(size, channels, data.crop_pct, data.augment.interpolation)
    train = Loader(
        splits.train,
        train_transform(data.augment, size, channels) if augmented else plain,
        batch=data.batch,
        seed=seed,
        train=augmented,
        repeats=data.repeats if augmented else 1,
        limit=data.limit,
        **shared,
    )
    val = None
    held = splits.test if final and splits.test is not None else splits.val
    if held is not None:
        val = Loader(
            held,
            plain,
            batch=data.val_batch or data.batch,
            train=False,
            limit=data.val_limit,
            **shared,
        )
    return Batches(splits, train, val, splits.train.classes or (), mean, std)


def make_finetune(recipe: recipes.Finetune, classes: int) -> FinetuneTask:
    """The model and its teacher, for fine-tuning."""
    model, new = _started(recipe.model, classes)
    teacher = None
    if recipe.distill.kind != "none":
        teacher = _teacher(recipe.distill.teacher, recipe.model, model, classes, new)
    return FinetuneTask(model, recipe.masking, recipe.distill, teacher)


def make_reduce(recipe: recipes.Reduce, classes: int) -> ReduceTask:
    """The model with its method, and the dense teacher of its losses."""
    model, new = _started(recipe.model, classes)
    reduced = api.apply(model, recipe.method)
    weights = own_weights(reduced) | recipe.weights
    teacher = None
    if any(weights.get(name) for name in ("kl", "token")):
        teacher = _teacher(recipe.teacher, recipe.model, model, classes, new)
    return ReduceTask(reduced, teacher, recipe.weights, recipe.token_loss)


def _teacher(
    path: str | None, start: recipes.Model, model: nn.Module, classes: int, new: bool
) -> nn.Module:
    """What teaches: a model of its own, or the start as it was before training."""
    if path is None:
        if start.start is None:
            raise ValueError(
                "there is nothing to learn from: the model starts from scratch and no teacher is "
                "named; give one, or set the weights of kl and token to 0"
            )
        if new:
            raise ValueError(
                f"{start.start} cannot teach, its head for {classes} classes is new: name a "
                "teacher that was trained for them"
            )
        teacher = copy.deepcopy(model)
    else:
        teacher = open_start(path)
    if isinstance(teacher, ReducedViT):
        raise ValueError(f"the teacher {path} has a method of its own; a dense model is needed")
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


def _made(recipe: recipes.Model, head: dict[str, int]) -> nn.Module:
    """A new model of timm or of ours, by name."""
    name = str(recipe.name)
    options = {**recipe.options, **head}
    if recipe.pool is not None:
        options["global_pool"] = recipe.pool
    if name in _OURS:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return _OURS[name](**options)
    if ":" in name or not timm.is_model(name):
        raise ValueError(f"model.name={name} is no model that timm knows, nor lvvit_s or lvvit_m")
    try:
        model = timm.create_model(name, pretrained=recipe.start == "pretrained", **options)
    except Exception as error:  # the hub, the network and timm's models raise many kinds
        raise ValueError(f"model.name={name}: {' '.join(str(error).split())}") from error
    embedding = getattr(model, "patch_embed", None)
    size, patch = (getattr(embedding, part, None) for part in ("img_size", "patch_size"))
    # timm rounds down, and would leave the rest of every image out.
    if size and patch and any(side % each for side, each in zip(size, patch, strict=True)):
        raise ValueError(
            f"images of {size[0]} x {size[1]} are not whole patches of {patch[0]} x {patch[1]}: "
            "change model.options.img_size or patch_size"
        )
    return model


def _opened(recipe: recipes.Model) -> nn.Module:
    """The model that a checkpoint holds, or a named one with its weights."""
    if recipe.name is None:
        model = open_start(str(recipe.start), recipe.weights)
        if isinstance(model, ReducedViT):
            _log.info("%s was saved with %r; its backbone is taken", recipe.start, model.reducer)
            model = model.vit
        return model.train()
    found = open_start(str(recipe.start), recipe.weights)
    found = found.vit if isinstance(found, ReducedViT) else found
    model = _made(recipe, {"num_classes": backbone_for(found).spec.classes})
    _take(model, found, recipe)
    return model


def _take(model: nn.Module, found: nn.Module, recipe: recipes.Model) -> None:
    """Copy all weights; a norm after pooling may be new, as MAE's fine-tuning has it."""
    state, target = found.state_dict(), model.state_dict()
    norms = ("norm.", "fc_norm.")  # after pooling instead of before
    lists = {
        "it has no": [k for k in target if k not in state and not k.startswith(norms)],
        "too many": [k for k in state if k not in target and not k.startswith(norms)],
        "of other shapes": [k for k in target if k in state and state[k].shape != target[k].shape],
    }
    words = [f"{what}: {', '.join(names[:3])}" for what, names in lists.items() if names]
    if words:
        raise ValueError(f"{recipe.start} does not fit {recipe.name}; {'; '.join(words)}")
    model.load_state_dict({k: v for k, v in state.items() if k in target}, strict=False)


def _give_head(model: Any, recipe: recipes.Model, classes: int) -> bool:
    """A head for the data's classes, and the pooling that was asked for; whether it is new."""
    spec = backbone_for(model).spec
    if recipe.start is not None and spec.classes not in (0, classes) and not recipe.new_head:
        raise ValueError(
            f"{recipe.start} has {spec.classes} classes, the data {classes}: model.new_head=true "
            "trains a new head"
        )
    pool = getattr(model, "global_pool", None)
    if spec.classes == classes and recipe.pool in (None, pool):
        return False
    if not hasattr(model, "reset_classifier"):
        what = f"{spec.classes} classes and cannot be given {classes}"
        if spec.classes == classes:
            what = f"a pooling of its own and cannot be given model.pool={recipe.pool}"
        raise ValueError(f"{type(model).__name__} has {what}")
    keep = None
    if spec.classes == classes:  # another pooling with the same head
        keep = {k: v.clone() for k, v in model.head.state_dict().items()}
    model.reset_classifier(classes, *([recipe.pool] if recipe.pool else []))
    if keep is not None:
        model.head.load_state_dict(keep)
    else:
        _log.info("a new head for %d classes", classes)
    return keep is None


def _checkpoint(model: Any) -> None:
    """Recompute activations in the backward pass."""
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):  # timm, transformers
        if hasattr(model, name):
            getattr(model, name)()
            return
    raise ValueError(f"model.checkpointing: {type(model).__name__} has no such switch")


def _set_drop_path(backbone: Backbone, rate: float) -> None:
    """Stochastic depth that grows linearly over the blocks, in a model that was made without."""
    rates: Any = calculate_drop_path_rates(rate, len(backbone.blocks))
    for block, p in zip(backbone.blocks, rates, strict=True):
        if not (hasattr(block, "drop_path1") and hasattr(block, "drop_path2")):
            raise ValueError(
                f"model.drop_path={rate}: {type(block).__name__} blocks have no place for it"
            )
        if p:
            block.drop_path1, block.drop_path2 = DropPath(p), DropPath(p)
