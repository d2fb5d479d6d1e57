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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    chance = {(rate, seed): Tally(classes) for rate in rates for seed in seeds}
    attention = {rate: Tally(classes) for rate in rates}
    with answering(*reading.values(), precision=precision):
        for images, labels, indices in batches():
            for rate, reduced in reading.items():
                attention[rate].add(reduced.run(images).logits, labels)
            for (rate, seed), tally in chance.items():
                drawn = _by_chance(backbone, rate, seed, indices.tolist())
                tally.add(drawn.run(images).logits, labels)
    found = []
    for rate in rates:
        # As many patches at the same blocks, and no images that it would be for.
        same = api.apply(
            model, "random", keep=rate, blocks=stage_blocks(backbone.spec.depth), check=False
        )
        top1: dict[int | None, float] = {seed: chance[rate, seed].result().top1 for seed in seeds}
        found += _rows(same, rate, top1, attention[rate])
    for rate, reduced in reading.items():
        found += _rows(reduced, rate, {None: attention[rate].result().top1}, attention[rate])
    return frame(found)


def _rows(
    model: ReducedViT, rate: float, top1: Mapping[int | None, float], tally: Tally
) -> list[dict[str, Any]]:
    reducer, spec = model.reducer, model.backbone.spec
    assert isinstance(reducer, ScoreReducer)
    shared = {"method": reducer.name, "rate": rate}
    found = []
    for seed, value in top1.items():
        found += rows("pruning", {"top1": value}, draw=seed, **shared)
    patches = now = spec.grid[0] * spec.grid[1]
    for stage, block in enumerate(stage_blocks(spec.depth)):
        now = reducer.schedule.count(stage, patches, now)
        found += rows("pruning", {"kept": now}, at=block, **shared)
    counted = {"macs": facts.count(model).macs, "images": tally.result().images}
    return found + rows("pruning", counted, **shared)


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Return rates in order, each once."""
    if not rates:
        raise ValueError("no pruning rate was given: at least one is needed")
    for rate in rates:
        check_keep(rate, "pruning rates")
    return tuple(sorted(dict.fromkeys(map(float, rates))))
