"""Make images, a model and a teacher from a recipe, and refuse what does not fit."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import timm
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn

from foveate import api, config
from foveate.backbones import backbone_for, image_settings, lvvit_m, lvvit_s, multiscale
from foveate.convert import SHIPPED, Settings, open_model, open_shipped
from foveate.core import Backbone, ReducedViT
from foveate.data import Splits, open_splits
from foveate.data.sources.base import IMAGE
from foveate.data.splits import NONE, holds_out, place
from foveate.train import recipe as recipes
from foveate.train.finetune import FinetuneTask
from foveate.train.images import ImageTask
from foveate.train.reduce import ReduceTask

__all__ = [
    *("LVVIT_MODELS", "check_start", "check_unseen", "make_finetune", "make_model", "make_reduce"),
    *("open_data", "open_start", "open_whole", "set_checkpointing", "set_drop_path"),
]

LVVIT_MODELS = {"lvvit_s": lvvit_s, "lvvit_m": lvvit_m}

_log = logging.getLogger(__name__)


def make_model(recipe: recipes.Model, classes: int | None) -> nn.Module:
    """Make the plain model that a run starts from; None for its classes keeps its own head."""
    return _started(recipe, classes)[0]


def _started(recipe: recipes.Model, classes: int | None) -> tuple[nn.Module, bool]:
    """Return the model, and whether its head has learnt nothing yet."""
    if isinstance(recipe.start, nn.Module):
        model = _bare(recipe.start).train()
    elif recipe.start is None:
        model = _made(recipe, {"num_classes": classes or 0})
    elif recipe.start == "pretrained":  # with its own head, so that other classes need new_head
        model = _made(recipe, {"num_classes": 0} if classes is None else {})
    else:
        model = _opened(recipe)
    new = recipe.start is None
    if recipe.multiscale is not None:
        try:
            model = multiscale(model, **recipe.multiscale)
        except ValueError as error:
            raise ValueError(f"model.multiscale: {error}") from error
    if classes is not None:
        new |= _give_head(model, recipe, classes)
    if recipe.drop_path:
        set_drop_path(backbone_for(model), recipe.drop_path)
    if recipe.checkpointing:
        set_checkpointing(model)
    return model, new


def _bare(model: nn.Module) -> nn.Module:
    """Return the backbone of a model that may have a method."""
    if isinstance(model, ReducedViT):
        _log.info(
            "the method %r of the given model is left out: its backbone is taken", model.reducer
        )
        return model.vit
    return model


def open_start(path: str | nn.Module, weights: str = "auto") -> nn.Module:
    """Open weights to start from or to learn from: a file, a folder, or a model that ships."""
    if isinstance(path, nn.Module):
        return path
    if path in SHIPPED:
        return open_shipped(str(path))
    return open_model(path, None, None, {}, Settings(weights=weights)).model


def open_whole(recipe: recipes.Model) -> nn.Module:
    """Open the model that a recipe names as it is: with its head, and with its method if any."""
    if recipe.start is None:
        raise ValueError(
            f"model.name={recipe.name} has random weights: model.start says which to begin with, "
            "such as pretrained"
        )
    if recipe.start == "pretrained":
        return _made(recipe, {})
    if recipe.name is not None:
        return _opened(recipe)
    return open_start(recipe.start, recipe.weights)


def open_data(data: recipes.Data, *, labels: bool = True, labels_of: str = IMAGE) -> Splits:
    """Open the images that a recipe names, and check that no two splits share any.

    Args:
        data: the recipe's.
        labels: without them images need none.
        labels_of: what must have labels: the whole "image", "objects" or "pixels".
    """
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
        labels_of=labels_of,
    )
    classes = splits.train.classes
    if splits.held_out is not None and classes is not None and labels_of == IMAGE:
        left = {splits.train.label(i) for i in range(len(splits.train))}
        lost = [name for number, name in enumerate(classes) if number not in left]
        if lost:
            _log.warning(
                "the division leaves no training image of %s, which another data.split_seed may do",
                ", ".join(lost),
            )
    return splits


def check_start(data: recipes.Data, start: Any) -> None:
    """Refuse a start that was trained on images which judge this run, if its recipe shows it."""
    if not isinstance(start, (str, Path)):
        return
    folder = Path(start) if Path(start).is_dir() else Path(start).parent
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    tree = config.load(path).get("data")
    # A data set object is recorded by its description, which cannot be opened.
    if isinstance(tree, dict) and isinstance(tree.get("train"), str):
        keys = [key for key in ("train", "val", "val_share", "split_seed") if key in tree]
        seen = config.parse(recipes.Data, {key: tree[key] for key in keys}, where=str(path))
        check_unseen(seen, str(start), data, "this run")


def check_unseen(seen: recipes.Data, who: str, data: recipes.Data, whose: str) -> None:
    """Refuse to judge a model by images that it was trained on.

    Args:
        seen: data of the recipe that trained it.
        who: name of the model or stage that was trained, for the error.
        data: data that judge.
        whose: name of the run that is judged, for the error.
    """
    for name in ("val", "test"):
        spec = getattr(data, name)
        if spec is not None and place(spec) == place(seen.train):
            raise ValueError(
                f"{who} trains on {spec}, which is data.{name} of {whose}: nothing may learn from "
                "the images that models are judged by"
            )
    if place(data.train) != place(seen.train):
        return
    for name in ("val", "val_share", "split_seed"):
        mine, its = getattr(seen, name), getattr(data, name)
        # Whether images are held out is asked last: the set is opened for that.
        if mine != its and holds_out(data.train, data.val):
            raise ValueError(
                f"{who} has data.{name}={mine} and {whose} {its}, on the same images: it would be "
                "trained on some that are held out for validation, so both must be the same"
            )


def make_finetune(recipe: recipes.Finetune, classes: int) -> FinetuneTask:
    """Make the model and its teacher for fine-tuning."""
    model, new = _started(recipe.model, classes)
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


def make_reduce(recipe: recipes.Reduce, classes: int) -> ReduceTask:
    """Make the model with its method, and the dense teacher of its losses."""
    model, new = _started(recipe.model, classes)
    method: Any = recipe.method  # in Python also an object, which keeps its parameters
    reduced = api.apply(model, method)
    task = ReduceTask(
        reduced,
        classes,
        recipe.data,
        recipe.mix,
        weights=recipe.weights,
        token_loss=recipe.token_loss,
    )
    if task.needs_teacher:
        teacher = _teacher(recipe.teacher, recipe.model, model, classes, new)
        task.learn_from(teacher)
        _compare_images(task, teacher)
    return task


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


def _made(recipe: recipes.Model, head: dict[str, int]) -> nn.Module:
    """Make a new model of timm or of ours by its name."""
    name = str(recipe.name)
    options = {**recipe.options, **head}
    if recipe.pool is not None:
        options["global_pool"] = recipe.pool
    if name in LVVIT_MODELS:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return LVVIT_MODELS[name](**options)
    if ":" in name or not timm.is_model(name):
        raise ValueError(
            f"model.name={name} is unknown: it must be a model that timm knows, lvvit_s or lvvit_m"
        )
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
    """Open the model that a checkpoint holds, or a named one with its weights."""
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
    """Copy all weights; a norm after pooling may be new, as in MAE's fine-tuning."""
    state, target = found.state_dict(), model.state_dict()
    norms = ("norm.", "fc_norm.")  # after pooling instead of before
    lists = {
        "it has no": [k for k in target if k not in state and not k.startswith(norms)],
        "too many": [k for k in state if k not in target and not k.startswith(norms)],
        "of other shapes": [k for k in target if k in state and state[k].shape != target[k].shape],
    }
    words = [f"{what}: {', '.join(names[:3])}" for what, names in lists.items() if names]
    if words:
        raise ValueError(f"{recipe.origin} does not fit {recipe.name}; {'; '.join(words)}")
    model.load_state_dict({k: v for k, v in state.items() if k in target}, strict=False)


def _give_head(model: Any, recipe: recipes.Model, classes: int) -> bool:
    """Set the head for the data's classes and the pooling; return whether the head is new."""
    spec = backbone_for(model).spec
    if recipe.start is not None and spec.classes not in (0, classes) and not recipe.new_head:
        raise ValueError(
            f"{recipe.origin} has {spec.classes} classes, the data {classes}: model.new_head=true "
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


def set_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass."""
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):  # timm, transformers
        if hasattr(model, name):
            getattr(model, name)()
            return
    raise ValueError(f"model.checkpointing: {type(model).__name__} has no such switch")


def set_drop_path(backbone: Backbone, rate: float) -> None:
    """Add stochastic depth, which grows linearly over the blocks, to a model made without it."""
    blocks = [*backbone.early_blocks, *backbone.blocks]
    rates: Any = calculate_drop_path_rates(rate, len(blocks))
    for block, p in zip(blocks, rates, strict=True):
        if not (hasattr(block, "drop_path1") and hasattr(block, "drop_path2")):
            raise ValueError(
                f"model.drop_path={rate}: {type(block).__name__} blocks have no place for it"
            )
        if p:
            block.drop_path1, block.drop_path2 = DropPath(p), DropPath(p)
