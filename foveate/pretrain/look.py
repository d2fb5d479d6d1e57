"""A look at pre-training runs afterwards: heterogeneity layer by layer, affinities, pictures.

Whatever weights a run has kept are measured on the same images with the same masks, so that lines
differ by the weights alone. Nothing is trained, and where a run began its weights is not opened.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.bench.machine import check_device
from foveate.data import Source, open_first, open_images
from foveate.data.splits import NONE
from foveate.files import write_text, write_whole
from foveate.pretrain.build import make_masked_model
from foveate.pretrain.heterogeneity import Similarity
from foveate.pretrain.kept import choose, evenly, locate, name_files, read_recipe, weights_kept
from foveate.pretrain.layers import ALARM, affinity, collapsing, measure_images, tokens_of
from foveate.pretrain.masks import Mask
from foveate.pretrain.method import MaskedImageModel, States, make_method
from foveate.pretrain.rauc import curve
from foveate.pretrain.recipe import Pretrain
from foveate.pretrain.reconstructions import picture, some_images
from foveate.pretrain.task import fixed_mask
from foveate.pretrain.weights import load_weights
from foveate.train.build import open_start
from foveate.train.images import image_inputs

__all__ = [
    "Choices",
    "Level",
    "Network",
    "Point",
    "Report",
    "RunLook",
    "look",
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
        device: to compute on.
    """

    epochs: tuple[float, ...] | None = ()
    untrained: bool = False
    similarity: Similarity = field(default_factory=Similarity)
    data: str | None = None
    images: int = 64
    seed: int = 0
    image: int = 0
    layers: tuple[int, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers are numbers from 0 on, got {list(self.layers)}")


@dataclass(frozen=True)
class Level:
    """One layer; 0 is before the first block, and before positions were added.

    Attributes:
        layer: blocks that were passed.
        mean: heterogeneity, normalised to [0, 1], mean over images.
        std: its standard deviation over images; None of a single one.
        cosine: mean cosine between visible tokens.
    """

    layer: int
    mean: float
    std: float | None
    cosine: float


@dataclass(eq=False)
class Network:
    """A network in which hidden and visible tokens meet.

    Attributes:
        levels: by layer.
        maps: affinities ``[N, N]`` of one image by layer, hidden tokens first.
    """

    levels: list[Level]
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
        """A sentence for each set of weights whose visible tokens are and stay nearly the same."""
        for run in self.runs:
            before: dict[int, float] = {}  # by network, of the weights of an earlier epoch
            for point in run.points:
                for number, network in enumerate(point.networks):
                    cosine = network.levels[0].cosine
                    alarming = collapsing(cosine, before.get(number))
                    before[number] = cosine
                    if alarming:
                        yield (
                            f"alarm: {run.name}, {point.label}: visible tokens have a mean cosine "
                            f"of {cosine:.3f} before the first block, above {ALARM:.2f}: nearly "
                            "all are the same"
                        )

    def json(self) -> dict[str, Any]:
        """All numbers, for a file."""
        kind = self.choices.similarity
        runs = []
        for run in self.runs:
            about = {
                **{"run": run.name, "folder": str(run.folder), "method": run.method},
                **{"data": run.data, "images": run.images, "mask": run.mask},
            }
            points = [
                {
                    "label": point.label,
                    "epoch": point.epoch,
                    "weights": None if point.file is None else str(point.file),
                    "loss": _finite(point.loss),
                    "val_loss": point.val_loss,
                    "networks": [[asdict(level) for level in one.levels] for one in point.networks],
                }
                for point in run.points
            ]
            runs.append({**about, "points": points})
        temperature = kind.temperature if kind.kind == "cosine" else None
        return {
            "format": 1,
            "similarity": {"kind": kind.kind, "temperature": temperature},
            "mask_seed": self.choices.seed,
            "image": self.choices.image,
            "runs": runs,
        }


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
    """Write look.json and the pictures into a folder, and name what was written."""
    from foveate.evaluate.style import save
    from foveate.pretrain.look_figures import affinity_figure, layers_figure

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "look.json"]
    text = json.dumps({"command": command, **report.json()}, indent=1, allow_nan=False)
    write_text(written[0], text + "\n")
    drawn = layers_figure(report)
    for kind in (".svg", ".png"):
        written.append(folder / f"heterogeneity{kind}")
        save(drawn, written[-1])
    written.append(folder / "affinity.png")
    save(affinity_figure(report), written[-1])
    for stem, run in zip(_stems(report.runs), report.runs, strict=True):
        written.append(folder / f"reconstructions{stem}.png")
        _save_picture(run.sheet, written[-1])
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
    masking = recipe.mask.filled(model.mask_kind, model.mask_ratio)
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
    sheet = picture(model, images[shown], _part(mask, shown), mean, std)
    about = {"kind": masking.kind, "ratio": masking.ratio}
    about |= {"hidden": int(mask.hidden[0].sum()), "patches": mask.hidden.shape[1]}
    where = f"{spec} ({split})"
    return RunLook(name, folder, recipe.method, where, len(images), about, points, sheet)


def _losses(folder: Path, recipe: Pretrain) -> dict[float, float]:
    """The loss on evaluation images by epoch, as far as the run has logged it."""
    if folder.is_file():
        return {}
    metric = "val/loss" if recipe.loop.ema is None else "val/loss_ema"
    try:
        return curve(folder, metric, least=1)
    except ValueError:  # no such column: nothing was evaluated
        return {}


def _new_model(recipe: Pretrain, file: Path) -> MaskedImageModel:
    """The recipe's model with the weights it would begin with, were it to begin from scratch."""
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
    """The loss and all networks, some images at a time."""
    loss = 0.0
    rows: list[list[tuple[Tensor, Tensor]]] = []  # by chunk and network
    maps: list[dict[int, np.ndarray]] = []
    for first in range(0, len(images), _CHUNK):
        chunk = slice(first, min(first + _CHUNK, len(images)))
        part = _part(mask, chunk)
        found = model(images[chunk], part, states=True)
        loss += float(sum(found.losses.values())) * len(part.hidden) / len(images)
        rows.append([measure_images(one, part, choices.similarity) for one in found.states])
        if chunk.start <= choices.image < chunk.stop:
            place = choices.image - first
            maps = [_maps(one, part, place, choices, layers) for one in found.states]
    networks = []
    for number, own in enumerate(maps):
        levels, cosines = (torch.cat([row[number][i] for row in rows], 1).cpu() for i in (0, 1))
        networks.append(Network(_levels(levels, cosines), own))
    return loss, networks


def _levels(levels: Tensor, cosines: Tensor) -> list[Level]:
    spread = levels.std(1).tolist() if levels.shape[1] > 1 else [None] * len(levels)
    each = zip(levels.mean(1).tolist(), spread, cosines.mean(1).tolist(), strict=True)
    return [Level(layer, *values) for layer, values in enumerate(each)]


def _maps(
    network: States, mask: Mask, place: int, choices: Choices, layers: Sequence[int]
) -> dict[int, np.ndarray]:
    """Affinities of one image."""
    one, tokens = slice(place, place + 1), tokens_of(network)
    return {
        layer: affinity(tokens[layer][one], _part(mask, one), choices.similarity)[0].cpu().numpy()
        for layer in layers
    }


def _part(mask: Mask, part: slice) -> Mask:
    """The masks of some images."""
    index = [None if one is None else one[part] for one in (mask.visible, mask.masked)]
    return Mask(mask.hidden[part], *index)


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None


def _save_picture(picture: Image.Image, path: Path) -> None:
    write_whole(path, lambda partial: picture.save(partial, format="png"))


def _stems(runs: Sequence[RunLook]) -> list[str]:
    """What tells the files of several runs apart."""
    if len(runs) == 1:
        return [""]
    stems: list[str] = []
    for number, run in enumerate(runs):
        stem = "-" + re.sub(r"[^A-Za-z0-9.=+-]+", "_", run.name).strip("_")
        stems.append(f"{stem}-{number}" if stem in stems else stem)
    return stems
