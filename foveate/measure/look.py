"""A look at pre-training runs afterwards: heterogeneity layer by layer, affinities, pictures.

Whatever weights a run has kept are measured on the same images with the same masks, so that lines
differ by the weights alone. Nothing is trained, and where a run began its weights is not opened.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.bench import machine
from foveate.data import Source, open_first, open_images
from foveate.data.splits import NONE
from foveate.files import write_whole
from foveate.measure.curves import columns, curve
from foveate.measure.kept import choose, evenly, locate, name_files, read_recipe, weights_kept
from foveate.measure.sheets import Sheet
from foveate.measure.style import save
from foveate.measure.table import Results, frame, rows
from foveate.mim.build import make_masked_model
from foveate.mim.heterogeneity import Similarity
from foveate.mim.layers import ALARM, affinity, collapsing, measure_images, tokens_of
from foveate.mim.masks import Mask
from foveate.mim.method import MaskedImageModel, States, make_method
from foveate.mim.recipe import Pretrain
from foveate.mim.reconstructions import picture, some_images
from foveate.mim.task import fixed_mask
from foveate.mim.weights import load_weights
from foveate.train.build import open_start
from foveate.train.images import image_inputs

__all__ = [
    "Choices",
    "Network",
    "Point",
    "Report",
    "RunLook",
    "look",
    "sheet",
    "words",
    "write",
]

_log = logging.getLogger(__name__)
_COLUMNS = 4  # affinity maps in a row, where nobody says which
_SHOWN = 6  # images whose hidden patches are drawn
_CHUNK = 64  # images at a time; tokens of all layers are held


@dataclass(kw_only=True)
class Choices:
    """What is looked at, and how.

    Attributes:
        epochs: after which weights are taken, of those that a run has kept; () is the last and at
            most 6 others, None all.
        untrained: measure new weights of the same model too.
        similarity: of tokens.
        data: a data set, as ``foveate.data.open_source`` takes it; None is the run's own.
        images: so many of them.
        seed: of the masks.
        image: number of the one whose affinities are drawn.
        layers: whose affinities are drawn; () is four of them.
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
class Network:
    """A network in which hidden and visible tokens meet; layer 0 is before the first block.

    Attributes:
        mean: heterogeneity by layer, normalised to [0, 1], mean over images, ``[layers]``.
        std: its standard deviation over images; NaN of a single one.
        cosine: mean cosine between visible tokens.
        maps: affinities ``[N, N]`` of one image by layer, hidden tokens first.
    """

    mean: np.ndarray
    std: np.ndarray
    cosine: np.ndarray
    maps: dict[int, np.ndarray]


@dataclass(eq=False)
class Point:
    """One set of weights of a run.

    Attributes:
        label: for tables and pictures.
        epoch: epochs of training; 0 is none, None where the file does not say.
        file: where the weights lie; None of new ones.
        loss: the method's own on the images that are looked at.
        val_loss: what the run logged; None if nothing.
        networks: what was measured.
    """

    label: str
    epoch: float | None
    file: Path | None
    loss: float
    val_loss: float | None
    networks: list[Network]


@dataclass(eq=False)
class RunLook:
    """What was found of a run.

    Attributes:
        name: for tables and pictures.
        folder: with its recipe; a file of weights that has none.
        method: of the recipe.
        data: where the images are from.
        images: how many there are.
        mask: kind, ratio, and how many patches are hidden of how many.
        points: by epoch; the last are the weights that the run ended with, if it has ended.
        sheet: some images with what the last weights make of them.
    """

    name: str
    folder: Path
    method: str
    data: str
    images: int
    mask: dict[str, Any]
    points: list[Point]
    sheet: Image.Image

    @property
    def hidden(self) -> int:
        """Hidden patches of an image."""
        return int(self.mask["hidden"])


@dataclass(eq=False)
class Report:
    """What was found of all runs."""

    choices: Choices
    runs: list[RunLook]

    def alarms(self) -> Iterator[str]:
        """Say for which weights the visible tokens are, and stay, nearly the same."""
        for run in self.runs:
            before: dict[int, float] = {}  # by network, of the weights of an earlier epoch
            for point in run.points:
                for number, network in enumerate(point.networks):
                    cosine = float(network.cosine[0])
                    alarming = collapsing(cosine, before.get(number))
                    before[number] = cosine
                    if alarming:
                        yield (
                            f"alarm: {run.name}, {point.label}: visible tokens have a mean cosine "
                            f"of {cosine:.3f} before the first block, above {ALARM:.2f}: nearly "
                            "all are the same"
                        )

    def results(self, command: str = "") -> Results:
        """Return all numbers as a table; "method" says which weights, "draw" which network.

        The part "layers" has mean, std and cosine by layer ("at"), the part "loss" the loss on
        these images and val_loss, which the run logged.
        """
        found: list[dict[str, Any]] = []
        for run in self.runs:
            for point in run.points:
                shared: dict[str, Any] = {"run": run.name, "method": point.label}
                for number, one in enumerate(point.networks):
                    columns = zip(one.mean, one.std, one.cosine, strict=True)
                    for layer, (mean, std, cosine) in enumerate(columns):
                        values = {"mean": mean, "std": None if np.isnan(std) else std}
                        values["cosine"] = cosine
                        found += rows("layers", values, at=layer, draw=number, **shared)
                loss = {"loss": point.loss, "val_loss": point.val_loss}
                found += rows("loss", loss, **shared)
        kind = self.choices.similarity
        about = {
            "command": command,
            "similarity": kind.kind,
            "temperature": kind.temperature if kind.kind == "cosine" else None,
            "mask_seed": self.choices.seed,
            "image": self.choices.image,
            "runs": {
                run.name: {
                    **{"folder": str(run.folder), "method": run.method, "data": run.data},
                    **{"images": run.images, "mask": run.mask},
                    "weights": {p.label: p.file and str(p.file) for p in run.points},
                    "epochs": {p.label: p.epoch for p in run.points},
                }
                for run in self.runs
            },
        }
        here = machine.facts(torch.device(self.choices.device).type)
        shared = {"commit": machine.commit() or "unknown", "machine": machine.name(here)}
        return Results(frame(found, **shared), about)


def look(runs: Sequence[Path], choices: Choices | None = None) -> Report:
    """Measure what pre-training runs have kept.

    Args:
        runs: folders of runs, single files of their weights, or files of foveate convert.
        choices: the usual ones if not given.
    """
    choices = choices or Choices()
    if not runs:
        raise ValueError("no run was given: name the folder of at least one")
    found: dict[Path, list[Path]] = {}
    for path in map(Path, runs):
        folder, file = locate(path)
        if folder.is_file() and choices.data is None:
            raise ValueError(f"{path} has no recipe that names images: name them with --data")
        found.setdefault(folder, []).extend([] if file is None else [file])
    names = [folder.absolute().name for folder in found]
    opened = []
    # All files are found before the work begins.
    for name, (folder, files) in zip(names, found.items(), strict=True):
        recipe = read_recipe(folder)
        kept = weights_kept(folder, recipe)
        chosen = name_files(files, kept) if files else choose(folder, kept, choices.epochs)
        label = name if name and names.count(name) == 1 else str(folder)
        opened.append((label, folder, recipe, chosen))
    return Report(choices, [_look(*one, choices) for one in opened])


def write(report: Report, folder: Path, *, command: str = "") -> list[Path]:
    """Write the table and the pictures into a folder, and name what was written."""
    from foveate.measure.look_figures import affinity_figure, layers_figure

    folder.mkdir(parents=True, exist_ok=True)
    written = report.results(command).save(folder / "look.json")
    drawn = layers_figure(report)
    for kind in (".svg", ".png"):
        written.append(folder / f"heterogeneity{kind}")
        save(drawn, written[-1])
    written.append(folder / "affinity.png")
    save(affinity_figure(report), written[-1])
    for stem, run in zip(_stems(report.runs), report.runs, strict=True):
        path = folder / f"reconstructions{stem}.png"
        write_whole(path, partial(_save_png, run.sheet))
        written.append(path)
    return written


# Measuring ---------------------------------------------------------------------------------------


def _look(
    name: str,
    folder: Path,
    recipe: Pretrain,
    chosen: dict[str, tuple[float | None, Path]],
    choices: Choices,
) -> RunLook:
    model = _new_model(recipe, next(iter(chosen.values()))[1]).eval().to(choices.device)
    data = recipe.data
    inputs = image_inputs(model.vit, data)
    mean, std = inputs.mean, inputs.std
    source = _images(recipe, choices)
    spec, split = source.spec, source.split
    images, wrong = some_images(inputs, source, choices.images)
    for reason in wrong:
        _log.warning("skipped %s", reason)
    if not 0 <= choices.image < len(images):
        raise ValueError(
            f"image must lie in 0..{len(images) - 1}, got {choices.image}: so many images of "
            f"{spec} are looked at"
        )
    layers = _columns(name, model.depth, choices.layers)
    images = images.to(choices.device)
    masking = recipe.mask.filled(model.hiding)
    mask = fixed_mask(model, images, masking, choices.seed)
    logged = _losses(folder, recipe)

    def point(label: str, epoch: float | None, file: Path | None) -> Point:
        loss, networks = _measured(model, images, mask, choices, layers)
        val_loss = logged.get(epoch) if epoch else None
        return Point(label, epoch, file, loss, val_loss, networks)

    points = [point("untrained", 0.0, None)] if choices.untrained else []
    for label, (epoch, file) in chosen.items():
        load_weights(model, file)
        points.append(point(label, epoch, file))
    shown = slice(0, _SHOWN)
    drawn = picture(model, images[shown], _part(mask, shown), mean, std)
    about = {"kind": masking.kind, "ratio": masking.ratio}
    about |= {"hidden": int(mask.hidden[0].sum()), "patches": mask.hidden.shape[1]}
    where = f"{spec} ({split})"
    return RunLook(name, folder, recipe.method, where, len(images), about, points, drawn)


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
        # What the model is stands in its start alone, and in what was written of it since.
        model = make_method(recipe.method, open_start(str(file)), recipe.options)
        model.initialise()
        return model


def _images(recipe: Pretrain, choices: Choices) -> Source:
    """Open the images that are looked at."""
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
) -> tuple[float, list[Network]]:
    """Measure the loss and all networks, some images at a time."""
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
        levels, cosines = (torch.cat([row[number][i] for row in each], 1).cpu() for i in (0, 1))
        spread = levels.std(1) if levels.shape[1] > 1 else torch.full((len(levels),), math.nan)
        mean, std, cosine = (
            part.double().numpy() for part in (levels.mean(1), spread, cosines.mean(1))
        )
        networks.append(Network(mean, std, cosine, own))
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


def _save_png(picture: Image.Image, path: str) -> None:
    picture.save(path, format="png")


def _stems(runs: Sequence[RunLook]) -> list[str]:
    """Return name endings that tell the files of several runs apart."""
    if len(runs) == 1:
        return [""]
    stems: list[str] = []
    for number, run in enumerate(runs):
        stem = "-" + re.sub(r"[^A-Za-z0-9.=+-]+", "_", run.name).strip("_")
        stems.append(f"{stem}-{number}" if stem in stems else stem)
    return stems


# The table in words ------------------------------------------------------------------------------


def words(similarity: Similarity) -> str:
    """Say what the numbers depend on, for titles."""
    known = {
        "cosine": f"cosine similarity, temperature {similarity.temperature:g}",
        "layernorm": "dot products of normalised tokens",
        "scaled": "scaled dot products",
        "raw": "raw dot products",
    }
    return known[similarity.kind]


def sheet(report: Report) -> Sheet:
    """Return a line for each set of weights, a column for each layer."""
    lines = [
        (run, point, number, network.mean)
        for run in report.runs
        for point in run.points
        for number, network in enumerate(point.networks)
    ]
    most = max(len(means) for *_, means in lines)
    digits = 3 if most <= 13 else 2  # what there is room for: changes are small
    several = any(number for _, _, number, _ in lines)
    head = ["<run", "<weights", *["network"] * several, *map(str, range(most))]
    body = []
    for run, point, number, means in lines:
        cells = [run.name, point.label, *[str(number)] * several]
        cells += [f"{mean:.{digits}f}" for mean in means] + [""] * (most - len(means))
        cells += [f"{point.loss:.4f}"]
        cells += ["" if point.val_loss is None else f"{point.val_loss:.4f}"]
        body.append(tuple(cells))
    images = sorted({run.images for run in report.runs})
    notes = [
        f"Means over {' or '.join(map(str, images))} images, layer 0 is before the first block; "
        "loss: on these images; val loss: as the run logged it."
    ]
    title = f"heterogeneity by layer, {words(report.choices.similarity)}"
    return Sheet(title, (*head, "loss", "val loss"), body, notes, ("val loss", "loss"))
