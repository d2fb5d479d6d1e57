"""The first and the last lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from lightning.pytorch import Trainer

from foveate.core import ReducedViT, Reducer
from foveate.data import Splits
from foveate.train.result import better_weights
from foveate.train.task import Task

__all__ = ["first_screen", "last_screen"]

_DENSE = ("detect", "segment")
_SHARES = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mean IoU"}  # said in per cent
_AGREEMENT = {"agreement": "agreement {:.1f} %", "kl": "KL {:.4f}", "cosine": "cosine {:.3f}"}
_NAMED = 5  # classes that are named


def first_screen(recipe: Any, task: Task, splits: Splits, trainer: Trainer, out: Path) -> str:
    """Return the lines that say what is trained, on which images and device, and where."""
    model = task.model
    plain = model.vit if isinstance(model, ReducedViT) else model
    millions = sum(p.numel() for p in plain.parameters()) / 1e6
    lines = {"model": f"{_name(recipe, plain)}, {millions:.1f} million parameters"}
    reducer = getattr(model, "reducer", None)  # of a reduced ViT, or of a model around one
    if isinstance(reducer, Reducer) and reducer.name != "dense":
        lines["method"] = repr(reducer)
    if budget := getattr(recipe, "budget", None):
        lines["budget"] = budget
    lines["images"] = splits.sentence()
    classes = getattr(model, "class_names", None) or splits.train.classes
    if classes:
        named = ", ".join(classes[:_NAMED])
        more = ", ..." if len(classes) > _NAMED else ""
        lines["classes"] = f"{len(classes)}: {named}{more}"
    on_gpu = trainer.strategy.root_device.type == "cuda"
    device, world = torch.cuda.get_device_name() if on_gpu else "cpu", trainer.world_size
    processes = f", {world} processes" if world > 1 else ""
    each = recipe.data.batch * recipe.loop.accumulate * world
    lines["device"] = f"{device}{processes}, precision {recipe.loop.precision}"
    lines["run"] = f"{recipe.loop.epochs} epochs, {each} images an update"
    lines["folder"] = str(out)
    return "\n".join(f"{key:8} {value}" for key, value in lines.items())


def _name(recipe: Any, model: torch.nn.Module) -> str:
    wanted = getattr(recipe, "model", None)
    if wanted is None:
        return type(model).__name__
    if not wanted.name:
        given = isinstance(wanted.start, torch.nn.Module)
        return f"a {wanted.origin} that was given" if given else f"the model of {wanted.origin}"
    return f"{wanted.name} from {wanted.origin}" if wanted.start else str(wanted.name)


def last_screen(job: str, result: Mapping[str, Any], out: Path) -> str:
    """Return the lines that say what a run reached, and what to type next."""
    images, best = result["images"]["val"], result.get("best", {})
    lines = [
        f"{_scores(result)} of {images} validation images, the model is {out / result['model']}"
    ]
    if best.get("model", result["model"]) != result["model"]:
        said = _scores({result["score"]: best["score"]}).removeprefix("accuracy ")
        lines.append(
            f"best     {said} after update {best['update']}, its model is {out / best['model']}"
        )
    where = quote(str(out))
    if job == "adapt":  # its images need no labels, so there may be nothing to evaluate on
        # Its last weights may be worse than those before, and even than before training.
        use = quote(str(better_weights(result, out)[0]))
        lines.append(f"next     foveate export {use} FOLDER --check    # to run it without foveate")
        lines.append(f"         foveate show {use} --images FOLDER --out kept.png")
        return "\n".join(lines)
    what = "    # on the test images" if "test" in result["splits"] else ""
    lines.append(f"next     foveate eval {where}{what}")
    if job in _DENSE:
        lines.append(f"         foveate predict {where} --images FOLDER --pictures FOLDER")
        lines.append(
            f"         foveate {job} RECIPE model.start={where} method=svit    # fewer tokens"
        )
    elif job == "finetune":
        lines.append(f"         foveate reduce RECIPE model.start={where}    # with fewer tokens")
    else:
        lines.append(f"         foveate show {where} --images FOLDER --out kept.png")
    return "\n".join(lines)


def _scores(result: Mapping[str, Any]) -> str:
    if "accuracy" in result:
        return f"accuracy {result['accuracy']:.2f} %"
    agreed = [
        words.format(result[name]) + _before(words, result.get(f"{name}_before"))
        for name, words in _AGREEMENT.items()
        if name in result
    ]
    if agreed:
        return ", ".join(agreed)
    known = {words: result[name] for name, words in _SHARES.items() if name in result}
    return ", ".join(f"{words} {100 * value:.1f} %" for words, value in known.items())


def _before(words: str, value: float | None) -> str:
    """Return in brackets the value of a number before training."""
    return "" if value is None else f" (before: {words.partition(' ')[2].format(value)})"
