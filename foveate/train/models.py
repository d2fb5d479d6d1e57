"""Make the model that a run starts from, say how it takes images, and refuse what does not fit."""

from __future__ import annotations

import logging
from typing import Any

import timm
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn

from foveate.backbones import (
    backbone_for,
    backbone_of,
    lvvit_m,
    lvvit_s,
    multiscale,
    set_image_settings,
)
from foveate.convert import SHIPPED, Settings, open_model, open_shipped
from foveate.core import Backbone, ReducedViT
from foveate.data import Inputs
from foveate.train import recipe as recipes

__all__ = [
    *("LVVIT_MODELS", "image_inputs", "make_model", "make_named", "open_start", "open_whole"),
    *("set_checkpointing", "set_drop_path", "started", "take"),
]

LVVIT_MODELS = {"lvvit_s": lvvit_s, "lvvit_m": lvvit_m}

_log = logging.getLogger(__name__)


def make_model(recipe: recipes.Model, classes: int | None) -> nn.Module:
    """Make the plain model that a run starts from; None for its classes keeps its own head."""
    return started(recipe, classes)[0]


def started(recipe: recipes.Model, classes: int | None) -> tuple[nn.Module, bool]:
    """Return the model, and whether its head has learnt nothing yet."""
    if isinstance(recipe.start, nn.Module):
        model = _bare(recipe.start).train()
    elif recipe.start is None:
        model = make_named(recipe, {"num_classes": classes or 0})
    elif recipe.start == "pretrained":  # with its own head, so that other classes need new_head
        model = make_named(recipe, {"num_classes": 0} if classes is None else {})
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
        return make_named(recipe, {})
    if recipe.name is not None:
        return _opened(recipe)
    return open_start(recipe.start, recipe.weights)


def make_named(recipe: recipes.Model, head: dict[str, int]) -> nn.Module:
    """Make a new model of timm or of ours by its name."""
    name = str(recipe.name)
    options = {**recipe.options, **head}
    if recipe.pool is not None:
        options["global_pool"] = recipe.pool
    if name in LVVIT_MODELS:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        try:
            return LVVIT_MODELS[name](**options)
        except TypeError as error:
            raise ValueError(f"model.name={name}: {error}") from error
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
    model = make_named(recipe, {"num_classes": backbone_for(found).spec.classes})
    take(model, found, recipe)
    return model


def take(model: nn.Module, found: nn.Module, recipe: recipes.Model) -> None:
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


def image_inputs(model: nn.Module, data: recipes.Data) -> Inputs:
    """Return how a model takes images; the recipe's settings are also stored on the model."""
    wanted = Inputs.of(model)
    if data.mean is not None and {len(data.mean), len(data.std or ())} != {wanted.channels}:
        raise ValueError(
            f"data.mean and data.std need one value for each of the model's {wanted.channels} "
            "channels"
        )
    said: dict[str, Any] = {
        "mean": data.mean or wanted.mean,
        "std": data.std or wanted.std,
        "crop_pct": data.crop_pct,
        "interpolation": data.augment.interpolation,
    }
    set_image_settings(backbone_of(model).model, said)
    return Inputs(size=wanted.size, channels=wanted.channels, **said)
