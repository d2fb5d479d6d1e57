"""Measure pre-training runs afterwards: heterogeneity layer by layer, affinities, pictures.

All weights that a run has kept are measured on the same images with the same masks, so that only
the weights differ. Nothing is trained, and the weights that a run started from are not needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate import machine
from foveate.data import Source, open_first, open_images
from foveate.data.splits import NONE
from foveate.files import write_whole
from foveate.measure.curves import columns, curve
from foveate.measure.kept import choose, locate, name_files, read_recipe, weights_kept
from foveate.measure.sheets import Sheet
from foveate.measure.style import evenly, save, stems
from foveate.measure.table import Results, frame, pd, rows, select
from foveate.mim.heterogeneity import Similarity
from foveate.mim.layers import ALARM, affinity, collapsing, measure_images, tokens_of
from foveate.mim.masks import Mask
from foveate.mim.method import MaskedImageModel, States, fixed_mask, make_method
from foveate.mim.models import make_masked_model
from foveate.mim.recipe import Pretrain
from foveate.mim.reconstructions import picture, some_images
from foveate.mim.weights import load_weights
from foveate.train.models import image_inputs, open_start

__all__ = ["Choices", "Look", "alarms", "look", "sheet", "words", "write"]

_log = logging.getLogger(__name__)
_COLUMNS = 4  # default number of affinity maps in a row
_SHOWN = 6  # images whose hidden patches are drawn
_CHUNK = 64  # images at a time; tokens of all layers are held


@dataclass(kw_only=True)
class Choices:
    """What to measure, and how.

    Attributes:
        epochs: epochs whose weights to take, of those that a run has kept; () is the last and at
            most 6 others, None all.
        untrained: measure new weights of the same model too.
        similarity: measure of how similar tokens are.
        data: a data set, as ``foveate.data.open_source`` takes it; None is the run's own.
        images: number of images.
        seed: seed of the masks.
        image: number of the image to draw affinities for.
        layers: layers to draw affinities for; () is four of them.
        device: to compute on; "auto" is a GPU if there is one.
    """

    epochs: tuple[float, ...] | None = ()
    untrained: bool = False
    similarity: Similarity = field(default_factory=Similarity)
    data: str | None = None
    images: int = 64
    seed: int = 0
    image: int = 0
    layers: tuple[int, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        self.device = machine.device_of(self.device)
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers are numbers from 0 on, got {list(self.layers)}")


@dataclass(eq=False)
class Look(Results):
    """The results of all runs.

    The column "method" names the weights, "draw" the network with hidden and visible tokens. The
    part "layers" has heterogeneity by layer ("at"; 0 is before the first block), normalised to [0,
    1]: mean and std over images, and cosine, the mean cosine between visible tokens. The part
    "loss" has the method's own loss on these images, and val_loss as the run logged it.

    Attributes:
        maps: affinities ``[N, N]`` of one image by layer, hidden tokens first; by run, weights and
            network.
        pictures: some images with what the last weights make of them, by run.
    """

    maps: dict[tuple[str, str, int], dict[int, np.ndarray]] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)


def look(runs: Sequence[Path], choices: Choices | None = None, *, command: str = "") -> Look:
    """Measure what pre-training runs have kept.

    Args:
        runs: folders of runs, single files of their weights, or files of foveate convert.
        choices: what to measure; None takes the defaults.
        command: command that was typed, for the record.
    """
    choices = choices or Choices()
    if not runs:
        raise ValueError("no run was given: name the folder of at least one")
    named: dict[Path, list[Path]] = {}
    for path in map(Path, runs):
        folder, file = locate(path)
        if folder.is_file() and choices.data is None:
            raise ValueError(f"{path} has no recipe that names images: name them with --data")
        named.setdefault(folder, []).extend([] if file is None else [file])
    names = [folder.absolute().name for folder in named]
    opened = []
    # All files are found before the work begins.
    for name, (folder, files) in zip(names, named.items(), strict=True):
        recipe = read_recipe(folder)
        kept = weights_kept(folder, recipe)
        chosen = name_files(files, kept) if files else choose(folder, kept, choices.epochs)
        label = name if name and names.count(name) == 1 else str(folder)
        opened.append((label, folder, recipe, chosen))
    kind = choices.similarity
    about: dict[str, Any] = {
        "command": command,
        "similarity": kind.kind,
        "temperature": kind.temperature if kind.kind == "cosine" else None,
        "mask_seed": choices.seed,
        "image": choices.image,
        "runs": {},
    }
    found = Look(frame([]), about)
    tables = [table for run in opened for table in _look(found, *run, choices)]
    facts = machine.facts(torch.device(choices.device).type)
    shared = {"commit": machine.commit() or "unknown", "machine": machine.name(facts)}
    found.table = frame(pd.concat(tables, ignore_index=True), **shared)
    return found


def alarms(found: Look) -> Iterator[str]:
    """Return a warning for all weights whose visible tokens stay nearly the same."""
    cosines = select(found.table, part="layers", metric="cosine", at=0)
    for (run, _), own in cosines.groupby(["run", "draw"], sort=False):
        before: float | None = None  # of the weights of an earlier epoch
        for weights, cosine in zip(own["method"], own["value"], strict=True):
            if collapsing(cosine, before):
                yield (
                    f"alarm: {run}, {weights}: visible tokens have a mean cosine of {cosine:.3f} "
                    f"before the first block, above {ALARM:.2f}: nearly all are the same"
                )
            before = cosine


def write(found: Look, folder: Path) -> list[Path]:
    """Write the table and the pictures into a folder, and return the paths."""
    from foveate.measure.look_figures import affinity_figure, layers_figure

    written = found.save(folder / "look.json")
    kinds = (folder / "heterogeneity.svg", folder / "heterogeneity.png")
    written += save(layers_figure(found), *kinds)
    written += save(affinity_figure(found), folder / "affinity.png")
    ends = [f"-{stem}" for stem in stems(found.pictures)] if len(found.pictures) > 1 else [""]
    for end, drawing in zip(ends, found.pictures.values(), strict=True):
        written.append(folder / f"reconstructions{end}.png")
        write_whole(written[-1], partial(drawing.save, format="png"))
    return written


# Measuring ---------------------------------------------------------------------------------------


def _look(
    found: Look,
    name: str,
    folder: Path,
    recipe: Pretrain,
    chosen: dict[str, tuple[float | None, Path]],
    choices: Choices,
) -> Iterator[pd.DataFrame]:
    """Measure one run: return its numbers, and put what is not a number into ``found``."""
    model = _new_model(recipe, next(iter(chosen.values()))[1]).eval().to(choices.device)
    inputs = image_inputs(model.vit, recipe.data)
    source = _images(recipe, choices)
    images, wrong = some_images(inputs, source, choices.images)
    for reason in wrong:
        _log.warning("skipped %s", reason)
    if not 0 <= choices.image < len(images):
        raise ValueError(
            f"image must lie in 0..{len(images) - 1}, got {choices.image}: "
            f"{len(images)} images of {source.spec} are measured"
        )
    layers = _columns(name, model.depth, choices.layers)
    images = images.to(choices.device)
    masking = recipe.mask.filled(model.hiding)
    mask = fixed_mask(model, images, masking, choices.seed)
    logged = _losses(folder, recipe)
    points: dict[str, tuple[float | None, Path | None]] = {**chosen}
    if choices.untrained:
        points = {"untrained": (0.0, None), **points}
    for label, (epoch, file) in points.items():
        if file is not None:
            load_weights(model, file)
        loss, networks = _measured(model, images, mask, choices, layers)
        values = {"loss": loss, "val_loss": logged.get(epoch) if epoch else None}
        yield frame(rows("loss", values), run=name, method=label)
        for number, (levels, maps) in enumerate(networks):
            yield frame(levels, part="layers", run=name, method=label, draw=number)
            found.maps[name, label, number] = maps
    found.pictures[name] = picture(
        model, images[:_SHOWN], _part(mask, slice(_SHOWN)), inputs.mean, inputs.std
    )
    hidden, patches = int(mask.hidden[0].sum()), mask.hidden.shape[1]
    found.about["runs"][name] = {
        **{"folder": str(folder), "method": recipe.method},
        **{"data": f"{source.spec} ({source.split})", "images": len(images)},
        "mask": {
            **{"kind": masking.kind, "ratio": masking.ratio},
            **{"hidden": hidden, "patches": patches},
        },
        "weights": {label: file and str(file) for label, (_, file) in points.items()},
        "epochs": {label: epoch for label, (epoch, _) in points.items()},
    }


def _losses(folder: Path, recipe: Pretrain) -> dict[float, float]:
    """Return the loss on evaluation images by epoch, as far as the run has logged it."""
    metric = "val/loss" if recipe.loop.ema is None else "val/loss_ema"
    if folder.is_file() or not (folder / "metrics.csv").is_file():
        return {}
    return curve(folder, metric) if metric in columns(folder) else {}


def _new_model(recipe: Pretrain, file: Path) -> MaskedImageModel:
    """Make the recipe's model with the weights of a start from scratch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.loop.seed)  # as training does
        if recipe.model.name is not None:
            return make_masked_model(replace(recipe, model=replace(recipe.model, start=None)))
        # The model itself is described only by its start, and by files written since.
        model = make_method(recipe.method, open_start(str(file)), recipe.options)
        model.initialise()
        return model


def _images(recipe: Pretrain, choices: Choices) -> Source:
    """Open the images to measure on."""
    if choices.data is not None:
        return open_first(choices.data, ("val", "test", "all", "train"), labels=False)
    data = recipe.data
    if data.val == NONE:
        return open_first(data.train, ("train", "all"), labels=False)
    if data.val is not None:
        return open_first(data.val, ("val", "all", "test"), labels=False)
    return open_images(data.train, "val", share=data.val_share, seed=data.split_seed, labels=False)


def _columns(name: str, depth: int, layers: tuple[int, ...]) -> list[int]:
    wrong = [layer for layer in layers if layer > depth]
    if wrong:
        raise ValueError(f"layers of {name} must lie in 0..{depth}, got {wrong[0]}")
    return sorted(set(layers)) or evenly(range(depth + 1), _COLUMNS)


@torch.no_grad()
def _measured(
    model: MaskedImageModel, images: Tensor, mask: Mask, choices: Choices, layers: Sequence[int]
) -> tuple[float, list[tuple[pd.DataFrame, dict[int, np.ndarray]]]]:
    """Return the loss, and the numbers by layer and the maps of each network."""
    loss = 0.0
    each: list[list[tuple[Tensor, Tensor]]] = []  # by chunk and network
    maps: list[dict[int, np.ndarray]] = []
    for first in range(0, len(images), _CHUNK):
        chunk = slice(first, min(first + _CHUNK, len(images)))
        part = _part(mask, chunk)
        answer = model(images[chunk], part, states=True)
        loss += float(sum(answer.losses.values())) * len(part.hidden) / len(images)
        each.append([measure_images(one, part, choices.similarity) for one in answer.states])
        if chunk.start <= choices.image < chunk.stop:
            place = choices.image - first
            maps = [_maps(one, part, place, choices, layers) for one in answer.states]
    networks = []
    for number, own in enumerate(maps):
        levels, cosines = (
            pd.DataFrame(torch.cat([chunk[number][i] for chunk in each], 1).double().T.cpu())
            for i in (0, 1)
        )
        table = levels.agg(["mean", "std"]).T.assign(cosine=cosines.mean())
        table = table.rename_axis("at").reset_index().melt("at", var_name="metric")
        networks.append((table.dropna(), own))  # one image has no deviation
    return loss, networks


def _maps(
    network: States, mask: Mask, place: int, choices: Choices, layers: Sequence[int]
) -> dict[int, np.ndarray]:
    """Return the affinities of one image, by layer."""
    one, tokens = slice(place, place + 1), tokens_of(network)
    return {
        layer: affinity(tokens[layer][one], _part(mask, one), choices.similarity)[0].cpu().numpy()
        for layer in layers
    }


def _part(mask: Mask, part: slice) -> Mask:
    """Return the masks of some images."""
    index = [None if one is None else one[part] for one in (mask.visible, mask.masked)]
    return Mask(mask.hidden[part], *index)


# The table in words ------------------------------------------------------------------------------


def words(about: Mapping[str, Any]) -> str:
    """Return what the numbers depend on, for titles."""
    known = {
        "cosine": f"cosine similarity, temperature {about['temperature']}",
        "layernorm": "dot products of normalised tokens",
        "scaled": "scaled dot products",
        "raw": "raw dot products",
    }
    return known[about["similarity"]]


def sheet(found: Look) -> Sheet:
    """Return a line for each set of weights, a column for each layer."""
    keys = ["run", "method", "draw"]
    means = select(found.table, part="layers", metric="mean")
    wide = means.pivot(index=keys, columns="at", values="value")
    wide = wide.reindex(means.set_index(keys).index.unique())
    digits = 3 if len(wide.columns) <= 13 else 2  # as many as fit, because changes are small
    table = wide.map(lambda mean: "" if pd.isna(mean) else f"{mean:.{digits}f}")
    table.columns = [f"{layer:g}" for layer in wide]
    losses = select(found.table, part="loss").pivot(
        index=keys[:2], columns="metric", values="value"
    )
    losses = losses.reindex(columns=["loss", "val_loss"]).rename(columns={"val_loss": "val loss"})
    losses = losses.map(lambda loss: "" if pd.isna(loss) else f"{loss:.4f}")
    table = table.join(losses, on=keys[:2]).reset_index().astype(str)
    table = table.rename(columns={"method": "weights", "draw": "network"})
    if table["network"].nunique() == 1:
        table = table.drop(columns="network")
    images = sorted({run["images"] for run in found.about["runs"].values()})
    notes = [
        f"Means over {' or '.join(map(str, images))} images, layer 0 is before the first block; "
        "loss: on these images; val loss: as the run logged it."
    ]
    title = f"heterogeneity by layer, {words(found.about)}"
    return Sheet(title, table, ("run", "weights"), notes, ("val loss", "loss"))
