"""Speed of several models in one interleaved run, each over its own dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.bench.result import LEAST_ROUNDS
from foveate.bench.timing import AGAIN, measure
from foveate.evaluate.answers import evaluating
from foveate.evaluate.rates import DENSE

__all__ = ["Speed", "speeds"]

_WARMUP, _SAMPLE_MS = 3, 20.0


@dataclass(frozen=True)
class Speed:
    """How fast one model is.

    Attributes:
        ratio, low, high: times as fast as its dense model, the median of paired rounds with its
            95 % interval; of a dense model, over itself.
        per_second: images a second.
        batch: images a call.
        rounds: of the interleaved run.
        spread: how far the interval of its dense model over itself reaches from 1.
    """

    ratio: float
    low: float
    high: float
    per_second: float
    batch: int
    rounds: int
    spread: float


def speeds(
    groups: Mapping[str, Mapping[str, nn.Module]],
    images: Mapping[str, Tensor],
    *,
    rounds: int = LEAST_ROUNDS,
    precision: str = "fp32",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Speed]]:
    """Time models in one run: in every round each of them once, in random order.

    Args:
        groups: models by name, in groups that have a dense model under the name "dense".
        images: a batch for each group, on the models' device.
        rounds: rounds that count.
        precision: "fp32", or "bf16" for automatic mixed precision.
        seed: of the order within rounds.
        progress: told, between rounds, how many of all rounds are done.
    """
    calls: dict[str, Callable[[], Any]] = {}
    keys: dict[tuple[str, str], str] = {}
    for group, models in groups.items():
        x = images[group]
        for name, model in models.items():
            keys[group, name] = f"{group}\n{name}"
            calls[keys[group, name]] = _call(model, x)
        calls[f"{group}\n{AGAIN}"] = _call(models[DENSE], x)
    everything = [model for models in groups.values() for model in models.values()]
    device = next(everything[0].parameters()).device.type
    with evaluating(*everything, precision=precision):
        timings = measure(
            calls,
            rounds=rounds,
            warmup=_WARMUP,
            sample_ms=_SAMPLE_MS,
            device=device,
            seed=seed,
            progress=progress,
        )
    found: dict[str, dict[str, Speed]] = {group: {} for group in groups}
    for (group, name), key in keys.items():
        dense = f"{group}\n{DENSE}"
        again = timings.ratio(dense, f"{group}\n{AGAIN}")
        ratio = again if name == DENSE else timings.ratio(key, dense)
        batch = len(images[group])
        found[group][name] = Speed(
            ratio=ratio.median,
            low=ratio.low,
            high=ratio.high,
            per_second=1000 * batch / timings.ms(key).median,
            batch=batch,
            rounds=rounds,
            spread=max(again.high - 1, 1 - again.low),
        )
    return found


def _call(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    return lambda: model(images)
