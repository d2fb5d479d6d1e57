"""The rate at which a method meets a budget: found before the first step, and kept with the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from foveate import api
from foveate.core import ReducedViT, Reducer
from foveate.files import read_json, write_text
from foveate.latency import WithoutWeights, is_time
from foveate.train.processes import device_of, processes

__all__ = ["method_of_run", "with_method"]

_KEPT = "budget.json"


def with_method(
    vit: nn.Module, method: str | Reducer, recipe: Any, out: Path | None = None
) -> ReducedViT:
    """Put a recipe's method on a model, at the rate that meets its budget if it has one.

    A time differs from day to day, so the rate is kept in the run's folder, and a run that is
    resumed goes on with it. A model on the meta device cannot be timed: there the method keeps its
    own rate, once all else is found right.

    Args:
        vit: the plain model.
        method: the method, or its name and options.
        recipe: has ``budget`` and ``loop``.
        out: folder of the run; None keeps nothing.
    """
    if recipe.budget is None:
        return api.apply(vit, method)
    asked = _asked(recipe.budget, method)
    found = None if out is None else _kept(asked, out)
    if found is None:
        found = _searched(vit, method, recipe)
        if out is not None and not rank_zero_only.rank:  # type: ignore[attr-defined]
            write_text(out / _KEPT, json.dumps({**asked, "found": found}, indent=1) + "\n")
    model = api.apply(vit, found)
    if isinstance(method, Reducer):
        api.take_weights(model.reducer, method)
    return model


def _searched(vit: nn.Module, method: str | Reducer, recipe: Any) -> str:
    """Return the method at the rate that meets the budget; unchanged on the meta device."""
    home = next(vit.parameters()).device
    if is_time(recipe.budget):
        _check_alone(recipe)
        if home.type != "meta":
            vit.to(device_of(recipe.loop))  # where it is timed
    try:
        with torch.random.fork_rng():  # the search makes many methods with new weights
            found = api.apply(vit, method, budget=recipe.budget).reducer
    except WithoutWeights:
        return str(method)
    vit.to(home)
    return repr(found)


def method_of_run(recipe: Any, out: Path) -> str:
    """Return the method that a run trains, at the rate that met its budget if it has one."""
    return _kept(_asked(recipe.budget, recipe.method), out) or str(recipe.method)


def _asked(budget: str | None, method: str | Reducer) -> dict[str, str | None]:
    return {"budget": budget, "method": str(method)}


def _kept(asked: dict[str, str | None], out: Path) -> str | None:
    """Return the method that was found for the same budget in the same folder, or None."""
    path = out / _KEPT
    if not path.is_file():
        return None
    kept = read_json(path, "")
    if not isinstance(kept, dict) or not isinstance(kept.get("found"), str):
        raise ValueError(f"{path} does not say which rate was found: delete it")
    return kept["found"] if asked.items() <= kept.items() else None


def _check_alone(recipe: Any) -> None:
    """Refuse to look for a time in several processes, which would find several rates."""
    devices, nodes = processes(recipe.loop, device_of(recipe.loop))
    if devices * nodes > 1:
        raise ValueError(
            f"budget={recipe.budget}: {devices * nodes} processes would time it at once, and find "
            "different rates; foveate describe MODEL METHOD --budget finds the rate on any "
            "machine: give it in method, and leave the budget out"
        )
