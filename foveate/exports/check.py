"""Compare an exported model with the model in torch: outputs and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.core.evaluation import answering
from foveate.exports.graph import Graph
from foveate.timing import DENSE, LEAST_ROUNDS, measure

__all__ = ["Check", "Speed", "compare", "speeds"]

_TOLERANCE = 1e-4  # share of the largest output, in float32
_TOGETHER = 8  # images in a call where the batch is free
_WARMUP, _SAMPLE_MS = 3, 20.0


@dataclass(frozen=True)
class Speed:
    """The time of one variant.

    Attributes:
        name: name of the variant.
        ms: median time of a call.
        times: how many times as fast as the dense model in torch, the median of paired rounds.
        low, high: bounds of its 95 % interval.
    """

    name: str
    ms: float
    times: float
    low: float
    high: float


@dataclass(frozen=True)
class Check:
    """How an exported model compares with the one in torch.

    Attributes:
        images: number of images that were compared.
        source: where the images are from.
        int8: whether the exported model computes in 8 bits.
        error: largest difference of an output, relative to the largest output of that image.
        beyond: number of images with a difference above 1e-4.
        agreement: share of images with the same most likely class; None without classes.
        divergence: mean Kullback-Leibler divergence of the exported model's classes; None without
            classes.
        batch: number of images in a timed call.
        threads: number of CPU threads.
        rounds: number of timed rounds.
        speeds: times of all variants in one interleaved run; empty if nothing was timed.
        broken: number of images with an output of the exported model that is not a finite number.
    """

    images: int
    source: str
    int8: bool
    error: float
    beyond: int
    agreement: float | None
    divergence: float | None
    batch: int = 0
    threads: int = 0
    rounds: int = 0
    speeds: tuple[Speed, ...] = ()
    broken: int = 0

    @property
    def passed(self) -> bool:
        """Whether the outputs agree with torch; in 8 bits, which round them, if all are finite."""
        return self.broken == 0 and (self.int8 or self.beyond == 0)

    def lines(self) -> list[str]:
        """Describe the comparison, one fact a line."""
        found = [f"compared with torch on {self.images} images ({self.source}):"]
        found.append(f"  largest difference of an output  {self.error:.1e} of the largest output")
        if self.broken:
            found.append(f"  images with outputs that are not finite numbers: {self.broken}")
        if self.beyond and not self.int8:
            found.append(
                f"  images that differ by more than {_TOLERANCE:.0e}: {self.beyond}; where two "
                "tokens score nearly the same, another one may be kept"
            )
        if self.agreement is not None:
            found.append(f"  same most likely class  {self.agreement:.1%} of the images")
            found.append(f"  divergence of the classes (KL)  {self.divergence:.1e}")
        if self.speeds:
            trial = "" if self.rounds >= LEAST_ROUNDS else ", a trial"
            found.append(
                f"times at batch {self.batch}, {self.threads} CPU threads, {self.rounds} "
                f"interleaved rounds{trial}:"
            )
            wide = max(len(speed.name) for speed in self.speeds)
            found += [
                f"  {one.name:{wide}}  {one.ms:8.2f} ms  {one.times:5.2f} times as fast "
                f"[{one.low:.2f}, {one.high:.2f}]"
                for one in self.speeds
            ]
        return found


def compare(
    model: nn.Module,
    ask: Callable[[np.ndarray], list[np.ndarray]],
    images: Tensor,
    source: str,
    *,
    graph: Graph,
    int8: bool,
) -> Check:
    """Run a model and its exported form on the same images.

    Args:
        model: model that returns a tensor or a tuple of tensors.
        ask: function that runs the exported model.
        images: preprocessed images; the last ones are left out if they do not fill a fixed batch.
        source: where the images are from.
        graph: graph that was exported.
        int8: whether the exported model computes in 8 bits.
    """
    step = graph.batch or _TOGETHER
    if graph.batch:
        images = images[: len(images) // step * step]
    wanted: list[list[np.ndarray]] = []
    got: list[list[np.ndarray]] = []
    with answering(model):
        for some in images.split(step):
            answer = model(some)
            parts = answer if isinstance(answer, tuple) else (answer,)
            wanted.append([part.numpy() for part in parts])
            got.append(ask(some.numpy()))
    ours, theirs = (
        [np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True)]
        for found in (wanted, got)
    )
    errors, finite = np.zeros(len(ours[0])), np.ones(len(ours[0]), bool)
    for own, other in zip(ours, theirs, strict=True):
        axes = tuple(range(1, own.ndim))
        finite &= np.isfinite(other).all(axes)
        scale = np.maximum(np.abs(own).max(axes), 1e-12)
        errors = np.maximum(errors, np.nan_to_num(np.abs(own - other).max(axes) / scale, nan=1e9))
    agreement = divergence = None
    if graph.outputs == ("logits",):
        agreement = float((ours[0].argmax(1) == theirs[0].argmax(1)).mean())
        with np.errstate(invalid="ignore"):  # of outputs that are not finite, which are counted
            p, q = _log_softmax(ours[0]), _log_softmax(theirs[0])
            divergence = float((np.exp(p) * (p - q)).sum(1).mean())
    beyond = int((errors > _TOLERANCE).sum())
    return Check(
        len(errors),
        source,
        int8,
        float(errors.max()),
        beyond,
        agreement,
        divergence,
        broken=int((~finite).sum()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    moved = logits - logits.max(1, keepdims=True)
    return moved - np.log(np.exp(moved).sum(1, keepdims=True))


def speeds(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Speed, ...]:
    """Time calls in one interleaved run, and compare each with the one named "dense".

    Args:
        calls: calls by name, in the order of the result; one is "dense".
        rounds: number of rounds that count.
        progress: called between rounds with the number of rounds done and the number of all.
    """
    with torch.inference_mode():
        timings = measure(
            calls,
            rounds=rounds,
            warmup=_WARMUP,
            sample_ms=_SAMPLE_MS,
            device="cpu",
            settle=True,
            progress=progress,
        )
    found = []
    for name in calls:
        ratio = timings.ratio(name, DENSE)
        found.append(Speed(name, timings.ms(name).median, ratio.median, ratio.low, ratio.high))
    return tuple(found)
