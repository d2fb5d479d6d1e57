"""Frozen features: how much a linear classifier and the nearest neighbours can read off them.

Features are taken once, from un-augmented images, and kept; the classifier is MAE's probe: a batch
norm without scale, one linear layer, LARS.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import config, machine
from foveate.backbones import backbone_for
from foveate.core import Backbone, BackboneSpec, ReducedViT, dense
from foveate.data import Inputs, Loader, Source, device_batches, limited, usual_workers
from foveate.files import made_folder, write_text
from foveate.train import recipe as recipes
from foveate.train.draws import seed_step
from foveate.train.models import image_inputs, make_model
from foveate.train.result import Result
from foveate.train.splits import check_start, open_data

__all__ = [
    "Watched",
    "check_reading",
    "driven",
    "features",
    "linear_probe",
    "nearest_neighbours",
    "probe",
    "read",
]

_log = logging.getLogger(__name__)
_Progress = Callable[[str, int, int], None]
_T = TypeVar("_T")


def probe(recipe: recipes.Probe, out: Path, progress: _Progress = lambda *_: None) -> Result:
    """Take features and measure them; gives the content of result.json."""
    started = time.monotonic()
    if (out / "metrics.csv").exists() or (out / "checkpoints").exists():
        raise ValueError(f"{out} holds a training run: the results of a probe go elsewhere")
    with made_folder(out):
        return _probe(recipe, out, progress, started)


def _probe(recipe: recipes.Probe, out: Path, progress: _Progress, started: float) -> Result:
    device = torch.device(machine.device_of("auto"))
    model = make_model(recipe.model, None)
    check_start(recipe.data, recipe.model.start)
    splits = open_data(recipe.data)
    if recipe.split == "test" and splits.test is None:
        raise ValueError(f"{recipe.data.train} has no test images: data.test names some")
    final = splits.test if recipe.split != "val" and splits.test is not None else splits.val
    assert final is not None
    shown = Watched.of(model, recipe.data, splits.train, final)
    write_text(out / "recipe.yaml", config.dump(recipe))
    scores, images = read(model.eval().to(device), shown, recipe, device, progress)
    result: dict[str, Any] = {"job": "probe", "feature": recipe.feature, **scores}
    result["accuracy"] = scores.get("linear", scores.get("knn"))
    result |= {
        "images": images,
        "splits": splits.facts(),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "machine": machine.facts(device.type),
        "commit": machine.commit(),
    }
    write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    return Result(out, result, model)


@dataclass(frozen=True)
class Watched:
    """Labelled images as evaluation sees them: those that are read by, and those that are read.

    Attributes:
        train: known images.
        held: images to be told.
        inputs: what the model takes.
    """

    train: Loader
    held: Loader
    inputs: Inputs

    @classmethod
    def of(cls, model: nn.Module, data: recipes.Data, train: Source, held: Source) -> Watched:
        """Make it as a recipe says; the model is told the data's mean and spread."""
        inputs = image_inputs(model, data)

        def load(source: Source, batch: int, limit: int | None, balanced: bool) -> Loader:
            return Loader(
                limited(source, limit, balanced=balanced),
                inputs.transform(),
                batch=batch,
                train=False,
                workers=usual_workers(source) if data.workers is None else data.workers,
                corrupt=data.corrupt,
            )

        return cls(
            load(train, data.batch, data.limit, True),
            load(held, data.val_batch or data.batch, data.val_limit, False),
            inputs,
        )


def read(
    model: nn.Module,
    watched: Watched,
    reading: recipes.Reading,
    device: torch.device,
    progress: _Progress = lambda *_: None,
) -> tuple[dict[str, float], dict[str, int]]:
    """Return a plain model's scores by "knn" and "linear", and how many images were read."""
    readable = driven(model)
    found = []
    for loader in (watched.train, watched.held):
        name = loader.source.split
        pairs = device_batches(loader, watched.inputs.mean, watched.inputs.std, device)
        counted = _counted(pairs, f"{name} features", len(loader), progress)
        found.append(features(readable, counted, reading))
    (x, y), (held, labels) = found
    scores: dict[str, float] = {}
    if reading.neighbours:
        scores["knn"] = nearest_neighbours(
            x, y, held, labels, k=reading.neighbours, temperature=reading.temperature
        )
    if reading.linear:
        with torch.enable_grad():
            scores["linear"] = linear_probe(x, y, held, labels, reading, progress)
    return scores, {"train": len(y), watched.held.source.split: len(labels)}


def driven(model: nn.Module) -> ReducedViT | Backbone:
    """Wrap a plain model in eval mode as ``features`` takes it."""
    backbone = backbone_for(model)
    return backbone if backbone.needs_every_token else dense(backbone).eval()


def check_reading(reading: recipes.Reading, spec: BackboneSpec, where: str = "") -> None:
    """Refuse to read a class token or a block that the model has not."""
    if reading.feature == "token" and not spec.class_token:
        raise ValueError(
            f"{where}feature=token needs a class token, which this model has not: use avg"
        )
    if reading.depth is not None and reading.depth > spec.depth:
        raise ValueError(f"{where}depth={reading.depth}: the model has {spec.depth} blocks")


@torch.no_grad()
def features(
    model: ReducedViT | Backbone,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    reading: recipes.Reading,
) -> tuple[Tensor, Tensor]:
    """Compute normed class tokens or means of patches, ``[images, C]`` float32, and the labels.

    A backbone in place of a driven model is of a family that no method runs on.
    """
    spec = model.backbone.spec if isinstance(model, ReducedViT) else model.spec
    check_reading(reading, spec)
    mixed = str(reading.precision) == "bf16-mixed"
    rows, labels = [], []
    for x, y, _ in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            tokens = _tokens(model, x, reading.depth)
        pooled = tokens[:, 0] if reading.feature == "token" else tokens[:, spec.prefix :].mean(1)
        rows.append(pooled.float())
        labels.append(y)
    return torch.cat(rows), torch.cat(labels)


def _tokens(model: ReducedViT | Backbone, images: Tensor, depth: int | None) -> Tensor:
    """Return the normed tokens after so many blocks ``[B, prefix + N, C]``; None is all blocks."""
    if isinstance(model, ReducedViT):
        if depth is None:
            return model.run(images).state.tokens()
        state = model.begin(images)
        for block in range(depth):
            state = model.step(block, state)
        return model.backbone.norm(state.tokens())
    return model.whole(images, depth).tokens()


def nearest_neighbours(
    x: Tensor, y: Tensor, held: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Return the accuracy in per cent of a vote of the k nearest, by exp(cosine / temperature)."""
    if k > len(x):
        raise ValueError(f"neighbours={k} is more than the {len(x)} training images")
    classes = int(torch.maximum(y.max(), labels.max())) + 1
    x, held = F.normalize(x, dim=1), F.normalize(held, dim=1)
    right = 0
    for rows, wanted in zip(held.split(1024), labels.split(1024), strict=True):
        near, which = (rows @ x.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes, device=x.device)
        votes.scatter_add_(1, y[which], (near / temperature).exp())
        right += int((votes.argmax(1) == wanted).sum())
    return 100 * right / len(labels)


def linear_probe(
    x: Tensor,
    y: Tensor,
    held: Tensor,
    labels: Tensor,
    recipe: recipes.Reading,
    progress: _Progress = lambda *_: None,
) -> float:
    """Return the accuracy in per cent of a linear classifier on the features."""
    classes = int(torch.maximum(y.max(), labels.max())) + 1
    torch.manual_seed(recipe.seed)
    linear = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6).to(x.device)
    head = nn.Sequential(norm, linear)
    batch = min(recipe.batch, len(x))
    peak = recipe.lr * batch / 256
    # Trust ratios for the weight, not for the bias; without weight decay timm's LARS has none
    # unless it is told to always adapt.
    optimiser = Lars(
        [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias]}],
        lr=peak,
        momentum=0.9,
        weight_decay=0.0,
    )
    steps = max(1, len(x) // batch)
    for epoch in range(recipe.epochs):
        seed_step(recipe.seed, epoch, 0)
        for step, chosen in enumerate(torch.randperm(len(x))[: steps * batch].split(batch)):
            rate = _rate(peak, epoch + step / steps, recipe)
            for group in optimiser.param_groups:
                group["lr"] = rate
            chosen = chosen.to(x.device)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(head(x[chosen]), y[chosen]).backward()
            optimiser.step()
        progress("linear probe", epoch + 1, recipe.epochs)
    head.eval()
    with torch.no_grad():
        return 100 * int((head(held).argmax(1) == labels).sum()) / len(labels)


def _rate(peak: float, epoch: float, recipe: recipes.Reading) -> float:
    """Return the rate at a point in an epoch: linear warm-up, then half a cosine to zero."""
    warmup = min(recipe.warmup_epochs, recipe.epochs / 2)
    if epoch < warmup:
        return peak * epoch / warmup
    done = (epoch - warmup) / (recipe.epochs - warmup)
    return peak * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())


def _counted(batches: Iterator[_T], what: str, of: int, progress: _Progress) -> Iterator[_T]:
    for number, batch in enumerate(batches, 1):
        progress(what, number, of)
        yield batch
