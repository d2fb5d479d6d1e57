"""How much a model still recognises when patches of the image are missing (the paper's Fig. 4).

Paper: Shi and Wang, "Bridging The Gaps Between Token Pruning and Full Pre-training via Masked
Fine-tuning", section IV.

Patches are dropped at random before the first block, and what is dropped is not computed. The
order in which an image loses its patches follows from the mask seed and the image's number alone:
the batch does not matter, and what a smaller ratio drops, a larger one drops too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from foveate.backbones import backbone_for
from foveate.core import ReducedViT, dense
from foveate.core.evaluation import answering
from foveate.measure.accuracy import Batches, Tally, name_of, rate_of
from foveate.measure.table import frame, pd, rows

__all__ = [
    "RATIOS",
    "check_ratios",
    "check_seeds",
    "keep_order",
    "kept_patches",
    "occlusion",
]

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_SLACK = 1e-9  # 10 * (1 - 0.9) is a little less than 1, and must not leave 0


def occlusion(
    model: nn.Module,
    batches: Batches,
    *,
    ratios: Sequence[float] = RATIOS,
    seeds: int | Sequence[int] = 3,
    classes: int | None = None,
    precision: str = "fp32",
) -> pd.DataFrame:
    """Measure the accuracy of a model on images that miss patches, in one pass over the data.

    The metrics are top1 (for each mask seed, in the column "draw"; once where nothing is dropped),
    kept (patches that are left) and images, at each share of dropped patches.

    Args:
        model: a plain ViT of a supported family, or one from ``foveate.apply``, whose method then
            goes on from the patches that are left.
        batches: gives a pass over the data.
        ratios: shares to drop, each in [0, 1]; 1 leaves the class token alone.
        seeds: of the masks, or how many.
        classes: how many the data set has.
        precision: as ``accuracy`` takes it.
    """
    ratios, seeds = check_ratios(ratios), check_seeds(seeds)
    driven = _driven(model)
    tallies = {(ratio, seed): Tally(classes) for ratio in ratios for seed in seeds}
    patches = 0
    with answering(driven, precision=precision), _ragged(driven):
        for images, labels, indices in batches():
            height, width = driven.backbone.grid_of(images)
            if patches not in (0, height * width):
                raise ValueError("images must all have one size, or a ratio means many counts")
            patches = height * width
            for seed in seeds:
                order = None
                for ratio in ratios:
                    kept = _kept(driven, patches, ratio)
                    if kept == patches:  # nothing is dropped, so no seed makes a difference
                        mask = None
                    else:
                        order = keep_order(indices, patches, seed) if order is None else order
                        mask = kept_patches(order, kept).to(images.device)
                    if mask is None and seed != seeds[0]:
                        continue
                    tallies[ratio, seed].add(driven.run(images, mask).logits, labels)
    found = []
    for ratio in ratios:
        kept = _kept(driven, patches, ratio)
        drawn = seeds[:1] if kept == patches else seeds
        results = {seed: tallies[ratio, seed].result() for seed in drawn}
        shared = {"at": ratio, "method": name_of(model), "rate": rate_of(model)}
        for seed, result in results.items():
            found += rows("occlusion", {"top1": result.top1}, draw=seed, **shared)
        counts = {"kept": kept, "images": results[drawn[0]].images}
        found += rows("occlusion", counts, **shared)
    return frame(found)


def keep_order(indices: Tensor, patches: int, seed: int) -> Tensor:
    """Return the patches of each image, those that stay longest first, ``[B, patches]``.

    It follows from the seed and each image's number ``indices [B]`` alone.
    """
    noise = np.empty((len(indices), patches))
    for row, index in zip(noise, indices.tolist(), strict=True):
        row[:] = np.random.Generator(np.random.PCG64([seed, index])).random(patches)
    return torch.from_numpy(noise.argsort(1, kind="stable"))


def kept_patches(order: Tensor, kept: int) -> Tensor:
    """Return the first ``kept`` patches of each order as a mask ``[B, patches]``."""
    return torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :kept], True)


def check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Return seeds as given, or the first so many."""
    found = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not found or min(found) < 0:
        raise ValueError(f"seeds must be a number of at least 1, or whole numbers, got {seeds!r}")
    return found


def check_ratios(ratios: Sequence[float], model: nn.Module | None = None) -> tuple[float, ...]:
    """Return ratios in order, each once; refuse those that leave a given model too little."""
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ValueError(f"occlusion ratios must lie in [0, 1], got {ratio!r}")
    if not ratios:
        raise ValueError("no occlusion ratio was given: at least one is needed")
    if model is not None:
        driven = _driven(model)
        rows, columns = driven.backbone.spec.grid
        _kept(driven, rows * columns, max(ratios))
    return tuple(sorted(dict.fromkeys(map(float, ratios))))


def _driven(model: nn.Module) -> ReducedViT:
    """Return what takes masks: the model itself, or a plain one driven without a method."""
    return model if isinstance(model, ReducedViT) else dense(backbone_for(model))


def _kept(model: ReducedViT, patches: int, ratio: float) -> int:
    """Return ``int(N * (1 - ratio))`` patches, if the model can do with so few."""
    kept = math.floor(patches * (1 - ratio) + _SLACK)
    spec = model.backbone.spec
    if kept == 0 and (spec.prefix == 0 or spec.pools_patches):
        raise ValueError(
            f"occlusion ratio {ratio:g} leaves none of {patches} patches, and this model's head "
            f"reads patches: at most {1 - 1 / patches:.3g}"
        )
    return kept


@contextmanager
def _ragged(model: ReducedViT) -> Iterator[None]:
    """Let a model that is set to run gathered take masks, for which it must run packed."""
    before = model.mode
    try:
        if before == "gathered":
            model.mode = "packed"
        yield
    finally:
        model.mode = before
