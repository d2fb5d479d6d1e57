"""Collect the facts about a model that its saved folder keeps for the card."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from foveate.core import ReducedViT
from foveate.core.cost import has_formula
from foveate.data import Inputs
from foveate.dense import DenseModel, Segmenter
from foveate.facts import count

__all__ = ["about"]

_PICTURES = (1, 3)  # channels of images whose preparation is known


def about(model: ReducedViT | DenseModel, license: str | None = None) -> dict[str, Any]:
    """Return the facts about a model that its card states, as plain data for JSON.

    Args:
        model: a model from ``apply``, a detector or a segmenter.
        license: name of the model's licence, as the hub writes it: "apache-2.0".
    """
    dense = isinstance(model, DenseModel)
    reduced = model.reduced if isinstance(model, DenseModel) else model
    backbone, methods = reduced.backbone, [m for m in reduced.reducer.members if m.name != "dense"]
    recipe = backbone.recipe() or {}
    return {
        "task": _task(model),
        "classes": model.num_classes if isinstance(model, DenseModel) else backbone.spec.classes,
        "model": recipe.get("timm") or recipe.get("transformers"),
        "family": backbone.spec.family,
        "width": backbone.spec.width,
        "depth": backbone.spec.depth,
        "patch": list(backbone.spec.patch),
        "around": {k: model.settings[k]["name"] for k in ("head", "backbone")} if dense else None,
        "method": repr(reduced.reducer) if methods else "",
        "methods": [method.name for method in methods],
        "fixed_count": reduced.reducer.fixed_count,
        "inputs": _dense_inputs(model) if isinstance(model, DenseModel) else _inputs(model),
        "counts": _counts(model, reduced),
        "license": license,
    }


def _task(model: ReducedViT | DenseModel) -> str:
    """Name the task as the hub's pipelines do."""
    if isinstance(model, DenseModel):
        return "image-segmentation" if isinstance(model, Segmenter) else "object-detection"
    classifies = model.backbone.spec.classes > 0
    return "image-classification" if classifies else "image-feature-extraction"


def _inputs(model: ReducedViT) -> dict[str, Any]:
    backbone = model.backbone
    if backbone.channels in _PICTURES:
        stated = asdict(Inputs.of(model))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in stated.items()}
    size = [n * side for n, side in zip(backbone.spec.grid, backbone.spec.patch, strict=True)]
    return {"size": size, "channels": backbone.channels}


def _dense_inputs(model: DenseModel) -> dict[str, Any]:
    limits = model.transform.image_size
    return {
        "size": list(model.input_size),
        "resized": None if limits is None else list(limits),
        "channels": model.reduced.backbone.channels,
        "mean": list(model.transform.image_mean),
        "std": list(model.transform.image_std),
    }


def _counts(model: ReducedViT | DenseModel, reduced: ReducedViT) -> dict[str, Any] | None:
    """Count the model; None if the number of tokens cannot be known without images."""
    if not (reduced.reducer.fixed_count or has_formula(reduced.reducer)):
        return None
    found = count(model)
    names = ("macs", "dense_macs", "method_macs", "parameters", "new_parameters", "how", "left_out")
    whole = {name: getattr(found, name) for name in names}
    return {**whole, "tokens": list(found.tokens), "parts": dict(found.parts)}
