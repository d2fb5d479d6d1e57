"""Pruning a model that was never trained for it (Table II of the masked fine-tuning paper).

Paper: Shi and Wang, "Bridging The Gaps Between Token Pruning and Full Pre-training via Masked
Fine-tuning", section IV.

Before each of three blocks ``int(N * rate**s)`` patches stay: those that random numbers or the
class token's attention in the previous block, averaged over heads, rank highest. Nothing is
trained.

Class attention is the library's "attention", which drops right after the attention that it reads:
it acts one block earlier, and what enters the next block is the same. The feed forward between
treats every token alone and is spared what would be dropped after it.

Chance is not the library's "random", which leaves all images the same positions: a few draws of
those say little. Here every image has its own, from the seed and its number, as in the occlusion
curve; what a later stage keeps is a part of what an earlier one kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate import api, facts
from foveate.backbones import backbone_for
from foveate.core import (
    AttentionReader,
    Backbone,
    ReducedViT,
    ScoreReducer,
    TokenState,
    check_keep,
    stage_blocks,
)
from foveate.core.evaluation import answering
from foveate.measure.accuracy import Batches, Tally
from foveate.measure.occlusion import check_seeds, keep_order
from foveate.measure.table import frame, pd, rows

__all__ = ["RATES", "check_rates", "prune", "pruning"]

RATES = (0.3, 0.5, 0.7)


@dataclass(eq=False, kw_only=True, repr=False)
class _Chance(ScoreReducer):
    """Random numbers of each image's own; made for one batch.

    Attributes:
        images: number of each image in its data set.
        seed: of the numbers.
    """

    images: tuple[int, ...] = ()
    seed: int = 0

    name: ClassVar[str] = "random"
    hooks: ClassVar[tuple[str, ...]] = ("before",)
    needs_place: ClassVar[bool] = True

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        """Score highest what stays longest; the order is the same in every stage."""
        assert state.place is not None
        order = keep_order(torch.tensor(self.images), state.patches, self.seed)
        rank = order.argsort(1).to(state.x.device)
        places = state.after_prefix(state.place)
        return -rank.gather(1, places).float()


def prune(
    model: nn.Module, method: str, rate: float, *, seed: int = 0, images: Sequence[int] = ()
) -> ReducedViT:
    """Put the pruning on a plain model.

    Args:
        model: a plain ViT of a supported family.
        method: "random" or "attention".
        rate: share of patches that a stage keeps, in (0, 1].
        seed: of "random".
        images: for "random", which is for one batch: the number of each image in its data set.
    """
    if isinstance(model, ReducedViT):
        raise ValueError(
            f"pruning without training is of plain models; this one has {model.reducer!r}"
        )
    backbone = backbone_for(model)
    if method == "random":
        return _by_chance(backbone, rate, seed, images)
    if method == "attention":
        earlier = tuple(block - 1 for block in stage_blocks(backbone.spec.depth))
        return api.apply(model, "attention", keep=rate, blocks=earlier, check=False)
    raise ValueError(f"method must be one of 'random', 'attention'; got {method!r}")


def _by_chance(backbone: Backbone, rate: float, seed: int, images: Sequence[int]) -> ReducedViT:
    reducer = _Chance(
        keep=rate, blocks=stage_blocks(backbone.spec.depth), seed=seed, images=tuple(images)
    )
    reducer.build(backbone.spec)
    driver: type[ReducedViT] = backbone.driver or ReducedViT
    return driver(backbone, reducer)


def pruning(
    model: nn.Module,
    batches: Batches,
    *,
    rates: Sequence[float] = RATES,
    seeds: int | Sequence[int] = 3,
    classes: int | None = None,
    precision: str = "fp32",
) -> pd.DataFrame:
    """Measure a plain model pruned at several rates, in one pass over the data.

    The methods are "random" and "attention". The metrics are top1 (of "random" for each seed, in
    the column "draw"), kept (patches that enter each of three blocks, in the column "at"), macs
    and images.

    Args:
        model: a plain ViT of a supported family.
        batches: gives a pass over the data.
        rates: shares that a stage keeps, each in (0, 1].
        seeds: of the random numbers, or how many.
        classes: how many the data set has.
        precision: as ``accuracy`` takes it.
    """
    rates, seeds = check_rates(rates), check_seeds(seeds)
    reading = {rate: prune(model, "attention", rate) for rate in rates}
    backbone = backbone_for(model)
    draws = [*(("random", seed) for seed in seeds), ("attention", None)]
    tallies = {(*draw, rate): Tally(classes) for draw in draws for rate in rates}
    with answering(*reading.values(), precision=precision):
        for images, labels, indices in batches():
            for (_, seed, rate), tally in tallies.items():
                reduced = reading[rate]
                if seed is not None:
                    reduced = _by_chance(backbone, rate, seed, indices.tolist())
                tally.add(reduced.run(images).logits, labels)
    found = []
    for (method, seed, rate), tally in tallies.items():
        result, shared = tally.result(), {"method": method, "rate": rate}
        found += rows("pruning", {"top1": result.top1}, draw=seed, **shared)
        if seed not in (None, seeds[0]):
            continue
        reduced = reading[rate]
        if seed is not None:
            # Count with as many patches in the same blocks; no images are needed.
            stages = stage_blocks(backbone.spec.depth)
            reduced = api.apply(model, "random", keep=rate, blocks=stages, check=False)
        for block, kept in _kept(reduced).items():
            found += rows("pruning", {"kept": kept}, at=block, **shared)
        counted = {"macs": facts.count(reduced).macs, "images": result.images}
        found += rows("pruning", counted, **shared)
    return frame(found)


def _kept(model: ReducedViT) -> dict[int, int]:
    """Return the patches that enter each of the three blocks."""
    reducer, spec = model.reducer, model.backbone.spec
    assert isinstance(reducer, ScoreReducer)
    patches = now = spec.grid[0] * spec.grid[1]
    found = {}
    for stage, block in enumerate(stage_blocks(spec.depth)):
        now = found[block] = reducer.schedule.count(stage, patches, now)
    return found


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Return rates in order, each once."""
    if not rates:
        raise ValueError("no pruning rate was given: at least one is needed")
    for rate in rates:
        check_keep(rate, "pruning rates")
    return tuple(sorted(dict.fromkeys(map(float, rates))))
