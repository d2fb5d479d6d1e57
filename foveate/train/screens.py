"""What a run says in its first lines and in its last ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from foveate.core import ReducedViT
from foveate.train.build import Batches
from foveate.train.task import Task

__all__ = ["first_screen", "last_screen"]

_NAMED = 5  # classes that are named


def first_screen(recipe: Any, task: Task, batches: Batches, out: Path, world: int) -> str:
    """Say what is about to be trained, on what, with what and where."""
    model = task.model
    plain = model.vit if isinstance(model, ReducedViT) else model
    millions = sum(p.numel() for p in plain.parameters()) / 1e6
    name = recipe.model.name or f"the model of {recipe.model.start}"
    if recipe.model.name and recipe.model.start:
        name += f" from {recipe.model.start}"
    lines = {"model": f"{name}, {millions:.1f} million parameters"}
    if isinstance(model, ReducedViT):
        lines["method"] = repr(model.reducer)
    lines["images"] = batches.splits.sentence()
    if batches.classes:
        named = ", ".join(batches.classes[:_NAMED])
        more = ", ..." if len(batches.classes) > _NAMED else ""
        lines["classes"] = f"{len(batches.classes)}: {named}{more}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    processes = f", {world} processes" if world > 1 else ""
    each = recipe.data.batch * recipe.loop.accumulate * world
    lines["device"] = f"{device}{processes}, precision {recipe.loop.precision}"
    lines["run"] = f"{recipe.loop.epochs} epochs, {each} images an update"
    lines["folder"] = str(out)
    return "\n".join(f"{key:8} {value}" for key, value in lines.items())


def last_screen(job: str, result: Mapping[str, Any], out: Path) -> str:
    """Say what came of a run, and what to type next."""
    images = result["images"]["val"]
    lines = [
        f"accuracy {result['accuracy']:.2f} % of {images} validation images, the model is "
        f"{out / result['model']}"
    ]
    best = result.get("best", {})
    if best.get("model", result["model"]) != result["model"]:
        lines.append(
            f"best     {best['score']:.2f} % after update {best['update']}, its model is "
            f"{out / best['model']}"
        )
    what = "    # on the test images" if "test" in result["splits"] else ""
    lines.append(f"next     foveate eval {out}{what}")
    if job == "finetune":
        lines.append(f"         foveate reduce RECIPE model.start={out}    # with fewer tokens")
    else:
        lines.append(f"         foveate show {out} --images FOLDER    # what it keeps")
    return "\n".join(lines)
