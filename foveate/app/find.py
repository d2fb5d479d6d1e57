"""Run a detector or a segmenter on one photograph, without a method and with one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from foveate import api
from foveate.app.look import Time, Told, check_rounds, timed
from foveate.dense import DenseModel, Segmenter
from foveate.facts import count
from foveate.latency import setting_of
from foveate.measure import DENSE
from foveate.predictions.dense import predict_and_draw

__all__ = ["Finding", "Findings", "find"]


@dataclass(frozen=True)
class Finding:
    """What was found, with a method or without.

    Attributes:
        name: "dense", or the method with its options.
        picture: the photograph, what was found in it and, with a method, the blocks that worked
            on each patch.
        found: names with their confidence, or for a segmenter with their share of the pixels.
        usage: share of the patches that the blocks worked on; None without a method.
        macs: multiply-adds of this image, except those that depend on what is found.
        time: how long a pass takes; None if nothing was timed.
    """

    name: str
    picture: Image.Image
    found: tuple[tuple[str, float], ...]
    usage: float | None
    macs: float
    time: Time | None


@dataclass(frozen=True)
class Findings:
    """What a model found without a method and with one.

    Attributes:
        each: one finding for each model, the dense model first.
        objects: True for a detector, False for a segmenter.
        left_out: what the multiply-adds do not include.
        setting: batch, precision and device of the times, in words.
        rounds: number of timed rounds.
    """

    each: tuple[Finding, ...]
    objects: bool
    left_out: str
    setting: str
    rounds: int


def find(
    model: DenseModel,
    image: Image.Image,
    method: str = "",
    least: float = 0.5,
    rounds: int = 10,
    progress: Told | None = None,
) -> Findings:
    """Run a detector or segmenter on a photograph, without a method and with one.

    Args:
        model: the detector or segmenter.
        image: the photograph, RGB.
        method: method to apply to a model that has none; "" runs the model's own, if any.
        least: lowest score of an object that is drawn and named.
        rounds: number of timed rounds; 0 times nothing.
        progress: called between rounds with the number of rounds done and the number of all.
    """
    check_rounds(rounds)
    models: dict[str, DenseModel] = {DENSE: model}
    if model.reducer.name != "dense":
        if method.strip():
            raise ValueError(f"the model has its own method {model.reducer!r}: give no other")
        plain: Any = api.unwrap(model)  # a model of the same class
        models = {DENSE: plain, repr(model.reducer): model}
    elif method.strip():
        reduced = api.apply(model, method.strip()).eval()
        models[repr(reduced.reducer)] = reduced
    pixels = [model.pixels(image)]
    times = timed(models, pixels, rounds, progress)
    each = []
    for name, one in models.items():
        record, picture = predict_and_draw(one, image, "photograph", least=least)
        labels = one.display_names
        pairs = zip(record.classes, record.scores, strict=True)
        found = [(labels[n], score) for n, score in pairs if score >= least or _areas(one)]
        counted = count(one, images=pixels)
        each.append(
            Finding(name, picture, tuple(found), record.usage, counted.macs, times.get(name))
        )
    setting = setting_of(model.reduced.backbone)
    return Findings(tuple(each), not _areas(model), counted.left_out, str(setting), rounds)


def _areas(model: DenseModel) -> bool:
    """Tell a segmenter, whose scores are shares of the pixels, from a detector."""
    return isinstance(model, Segmenter)
