"""Run methods on one photograph; compare patches, answers, cost and time with the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import api
from foveate.backbones import backbone_of
from foveate.core import ReducedViT, Trace, dense
from foveate.core.evaluation import answering
from foveate.data import Inputs
from foveate.dense import Hosting
from foveate.latency import setting_of
from foveate.measure import DENSE
from foveate.measure.variants import fresh, variants
from foveate.predictions import predict
from foveate.timing import AGAIN, Interval, measure
from foveate.viz import Walk
from foveate.viz.captions import image_cost

__all__ = [
    "MOST_METHODS",
    "MOST_ROUNDS",
    "Look",
    "Time",
    "Variant",
    "check_rounds",
    "look",
    "timed",
]

MOST_METHODS, MOST_ROUNDS = 6, 100
_TOP = 5
_WARMUP, _SAMPLE_MS = 2, 20.0
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Time:
    """How long a pass takes.

    Attributes:
        ms: median of the rounds, in milliseconds.
        times: how many times as fast as the dense model, from paired rounds.
        verdict: "faster", "slower" or "no difference" given the noise; "" for the dense model.
    """

    ms: float
    times: Interval
    verdict: str


@dataclass(frozen=True)
class Variant:
    """What a model does with the photograph, without a method or with one.

    Attributes:
        name: "dense", or the method with its options.
        answers: labels and confidences, the most confident one first; empty without a classifier.
        likeness: mean cosine of the patches' features with the dense model's.
        macs: multiply-adds of this image.
        tokens: tokens that each block feeds forward.
        walk: pictures of what became of the patches; None for the dense model.
        time: how long a pass takes; None if nothing was timed.
        trained: False if the method has untrained parameters.
    """

    name: str
    answers: tuple[tuple[str, float], ...]
    likeness: float
    macs: float
    tokens: tuple[int, ...]
    walk: Walk | None
    time: Time | None
    trained: bool


@dataclass(frozen=True)
class Look:
    """The dense model and its variants on one photograph.

    Attributes:
        variants: all variants, the dense model first.
        setting: batch, precision and device of the times, in words.
        rounds: number of timed rounds.
    """

    variants: tuple[Variant, ...]
    setting: str
    rounds: int

    @property
    def steps(self) -> int:
        """Return the number of pictures that the longest walk has."""
        return max(len(one.walk) for one in self.variants if one.walk is not None)


def look(
    model: nn.Module,
    image: Image.Image,
    methods: Sequence[str] = (),
    amount: str = "",
    rounds: int = 10,
    progress: Told | None = None,
) -> Look:
    """Run a model with each method on a photograph, and compare it with the dense model.

    Args:
        model: a plain ViT, or one with a method of its own.
        image: the photograph, RGB. It is prepared as ``foveate predict`` does.
        methods: methods such as "evit" or "tome(r=8)"; may be empty if the model has its own.
        amount: a rate for the methods that name none, such as "0.7"; or a budget, such as "60%",
            "2.9 GMACs" or "1.5x faster"; "" leaves each method at its own rate.
        rounds: number of timed rounds; 0 times nothing.
        progress: called between rounds with the number of rounds done and the number of all.
    """
    check_rounds(rounds)
    if len(methods) > MOST_METHODS:
        raise ValueError(f"at most {MOST_METHODS} methods at a time, got {len(methods)}")
    models = _models(model, methods, amount.strip())
    inputs, like = Inputs.of(model), next(model.parameters())
    batch, box = inputs.batch([image], like), inputs.box(image)
    traced = {DENSE: dense(backbone_of(model)), **models}
    with answering(*traced.values()):
        traces = {name: one.trace(batch) for name, one in traced.items()}
    times = timed(
        {DENSE: api.unwrap(model) if _own(model) else model, **models}, batch, rounds, progress
    )
    whole = _features(traces[DENSE])
    found = []
    for name, one in traced.items():
        trace = traces[name]
        found.append(
            Variant(
                name=name,
                answers=_answers(one, image),
                likeness=float(F.cosine_similarity(_features(trace), whole, dim=-1).mean()),
                macs=image_cost(one, trace)[0],
                tokens=tuple(lengths[0] for lengths in trace.counts()),
                walk=None if name == DENSE else Walk.of(trace, image, box=box),
                time=times.get(name),
                trained=not fresh(model, one),
            )
        )
    return Look(tuple(found), str(setting_of(backbone_of(model))), rounds)


def check_rounds(rounds: int) -> None:
    """Refuse a number of timed rounds that the page does not run."""
    if not 0 <= rounds <= MOST_ROUNDS:
        raise ValueError(f"timed rounds must lie in 0..{MOST_ROUNDS}, got {rounds}")


def timed(
    models: Mapping[str, nn.Module],
    images: Tensor | list[Tensor],
    rounds: int,
    progress: Told | None,
) -> dict[str, Time]:
    """Time models in one interleaved run.

    Args:
        models: the models by name; one is called "dense".
        images: what the models are called with.
        rounds: number of rounds that count; 0 gives no times.
        progress: called between rounds with the number of rounds done and the number of all.
    """
    if not rounds:
        return {}
    calls = {name: partial(one, images) for name, one in models.items()}
    calls[AGAIN] = calls[DENSE]
    with answering(*models.values()):
        found = measure(
            calls,
            rounds=rounds,
            warmup=_WARMUP,
            sample_ms=_SAMPLE_MS,
            device=next(models[DENSE].parameters()).device.type,
            progress=progress,
        )
    spread = found.ratio(AGAIN, DENSE).spread
    times = {}
    for name in models:
        ratio = found.ratio(name, DENSE)
        verdict = "" if name == DENSE else ratio.beyond(spread)
        times[name] = Time(found.ms(name).median, ratio, verdict)
    return times


def _models(model: nn.Module, methods: Sequence[str], amount: str) -> dict[str, ReducedViT]:
    """Put methods on a model, at a rate or within a budget; return the models by name."""
    if isinstance(model, Hosting):
        raise ValueError(f"open a {type(model).__name__} in the tab Detection")
    if not methods and not _own(model):
        raise ValueError("choose a method: this model has none of its own")
    rate = _number(amount)
    if not amount or rate is not None:
        found = variants(model, methods, () if rate is None else (rate,))
        # At another rate, the model's own method is shown only at that rate.
        if rate is not None and not methods and len(found) > 2:
            del found[repr(model.reducer)]
    elif _own(model):
        raise ValueError(
            f"the model has its own method {model.reducer!r}, which takes a rate but no budget: "
            f"{amount!r} is for plain models"
        )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reduced = [_within(amount, model, text) for text in methods]
        found = {repr(one.reducer): one for one in reduced}
    return {name: one for name, one in found.items() if isinstance(one, ReducedViT)}


def _within(budget: str, model: nn.Module, method: str) -> ReducedViT:
    try:
        return api.apply(model, method, budget=budget).eval()
    except ValueError as error:  # say which of several methods
        raise ValueError(f"{method}: {error}") from error


def _own(model: nn.Module) -> bool:
    return isinstance(model, ReducedViT)


def _number(text: str) -> float | None:
    """Read a rate; None if the text is not a number."""
    try:
        rate = float(text)
    except ValueError:
        return None
    if not math.isfinite(rate) or rate <= 0:
        raise ValueError(f"a rate must be a number above 0, got {text}")
    return rate


def _features(trace: Trace) -> Tensor:
    """Return the features of the patches on the grid, ``[H*W, C]``."""
    return trace.final.restore()[0].float()


def _answers(model: ReducedViT, image: Image.Image) -> tuple[tuple[str, float], ...]:
    if not model.backbone.classifies:
        return ()
    (found,) = predict(model, image, top=_TOP)
    return tuple(zip(found.labels, found.confidences, strict=True))
