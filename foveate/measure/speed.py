"""Time several models, which take turns in one run, and compare each with its own dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from foveate.core.evaluation import answering
from foveate.measure.accuracy import name_of, rate_of
from foveate.measure.table import frame, pd, rows
from foveate.measure.variants import DENSE
from foveate.timing import AGAIN, LEAST_ROUNDS, measure

__all__ = ["speeds"]

_WARMUP, _SAMPLE_MS = 3, 20.0


def speeds(
    groups: Mapping[str, Mapping[str, nn.Module]],
    images: Mapping[str, Tensor],
    *,
    rounds: int = LEAST_ROUNDS,
    precision: str = "fp32",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Time models in one run: in every round each of them once, in random order.

    The column "at" is the batch. The metrics are times (as fast as the dense model of the group,
    the median of paired rounds; of a dense model, over itself) with low and high, its 95 %
    interval, per_second (images), rounds, and spread (how far the dense model's interval over
    itself reaches from 1).

    Args:
        groups: models by name, in groups that have a dense model under the name "dense".
        images: a batch for each group, on the models' device.
        rounds: rounds that count.
        precision: "fp32", or "bf16" for automatic mixed precision.
        seed: of the order within rounds.
        progress: told, between rounds, how many of all rounds are done.
    """
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for group, models in groups.items():
        for name, model in {**models, AGAIN: models[DENSE]}.items():
            calls[group, name] = _call(model, images[group])
    everything = [model for models in groups.values() for model in models.values()]
    with answering(*everything, precision=precision):
        timings = measure(
            {"\n".join(key): call for key, call in calls.items()},
            rounds=rounds,
            warmup=_WARMUP,
            sample_ms=_SAMPLE_MS,
            device=next(everything[0].parameters()).device.type,
            seed=seed,
            progress=progress,
        )
    found = []
    for group, models in groups.items():
        batch = len(images[group])
        again = timings.ratio(f"{group}\n{DENSE}", f"{group}\n{AGAIN}")
        for name, model in models.items():
            ratio = (
                again if name == DENSE else timings.ratio(f"{group}\n{name}", f"{group}\n{DENSE}")
            )
            values = {
                **{"times": ratio.median, "low": ratio.low, "high": ratio.high},
                "per_second": 1000 * batch / timings.ms(f"{group}\n{name}").median,
                "rounds": rounds,
                "spread": again.spread,
            }
            shared = {"run": group, "method": name_of(model), "rate": rate_of(model), "at": batch}
            found += rows("speed", values, **shared)
    return frame(found)


def _call(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    return lambda: model(images)
