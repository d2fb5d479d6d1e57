"""Make the model that a pre-training starts from: a method on its ViT."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate.mim.method import MaskedImageModel, make_method
from foveate.mim.recipe import Pretrain
from foveate.mim.weights import load_rest, load_weights, method_of, rest_path
from foveate.train.models import make_model
from foveate.train.recipe import Model

__all__ = ["make_masked_model"]

_log = logging.getLogger(__name__)


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
