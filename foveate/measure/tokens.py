"""Count what a method does to the tokens of a whole data set: which it keeps and brings back.

Everything is read off the records of ``ReducedViT.trace``, one batch after another; no trace is
kept. A patch is *used* by a block whose feed forward works on the token that carries it.

The reactivation ratio is that of Liu et al., "Revisiting Token Pruning for Object Detection and
Instance Segmentation", WACV 2024: of the patches that a block leaves out, those that some later
block uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.core import ReducedViT, TokenState, Trace
from foveate.core.evaluation import answering
from foveate.measure.accuracy import Batches, rate_of
from foveate.measure.table import frame, pd, rows

__all__ = ["TokenStatistics", "gather", "token_statistics"]


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of one model over a data set, as arrays.

    Attributes:
        method: the method, with its options.
        rate: rate of the method; None if it has none.
        stages: blocks that use other patches, or other groups of them, than the block before.
        keep: share of images in which a block uses the patch at a position, ``[blocks, H, W]``.
        group: patches that the token stands for which carries a position, a mean over the images in
            which it is used; 1 where nothing merged. ``[blocks, H, W]``.
        usage: share of the patches that each block uses, ``[images, blocks]``.
        tokens: tokens that each block feeds forward, prefix and fused ones included,
            ``[images, blocks]``.
        reactivation: of the patches that a block leaves out, the share that a later block uses; NaN
            where a block leaves out none. ``[blocks]``.
        at_once: of those used later, the share that the very next block uses, ``[blocks]``.
    """

    method: str
    rate: float | None
    stages: tuple[int, ...]
    keep: np.ndarray
    group: np.ndarray
    usage: np.ndarray
    tokens: np.ndarray
    reactivation: np.ndarray
    at_once: np.ndarray

    @property
    def images(self) -> int:
        """Return the number of images."""
        return len(self.tokens)

    def table(self) -> pd.DataFrame:
        """Return rows for each block, and rows for the images, of which each is a mean over blocks.

        A deviation is that of the images.
        """
        shared: dict[str, Any] = {"method": self.method, "rate": self.rate}
        found = []
        for block in range(self.usage.shape[1]):
            values = {
                "tokens": self.tokens[:, block].mean(),
                "usage": self.usage[:, block].mean(),
                "usage_deviation": self.usage[:, block].std(),
                "reactivation": self.reactivation[block],
                "at_once": self.at_once[block],
            }
            there = {name: value for name, value in values.items() if np.isfinite(value)}
            found += rows("tokens", there, at=block, **shared)
        each, last = self.tokens.mean(1), self.tokens[:, -1]
        low, high = np.quantile(each, (0.05, 0.95))
        summary = {
            **{"mean": each.mean(), "deviation": each.std(), "low": low, "high": high},
            **{"last": last.mean(), "last_deviation": last.std(), "images": self.images},
            **{"used": self.usage.mean(), "used_last": self.usage[:, -1].mean()},
        }
        return frame(found + rows("tokens", summary, **shared))


def token_statistics(
    model: nn.Module, batches: Batches, *, precision: str = "fp32"
) -> TokenStatistics:
    """Gather the statistics of a model from ``foveate.apply`` over a data set.

    Args:
        model: runs as it does in evaluation.
        batches: gives a pass over the data, of images of one size.
        precision: as ``accuracy`` takes it.
    """
    return gather({"": model}, batches, precision=precision)[""]


def gather(
    models: Mapping[str, nn.Module], batches: Batches, *, precision: str = "fp32"
) -> dict[str, TokenStatistics]:
    """Gather ``token_statistics`` of several models in one pass over the data."""
    sums: dict[str, tuple[ReducedViT, _Sums]] = {}
    for name, model in models.items():
        if not isinstance(model, ReducedViT):
            raise ValueError(
                "token statistics are of models from foveate.apply; a model without a method "
                "uses every patch in every block"
            )
        sums[name] = model, _Sums()
    with answering(*models.values(), precision=precision):
        for images, _, _ in batches():
            for model, total in sums.values():
                total.add(model.trace(images))
    return {name: total.result(model) for name, (model, total) in sums.items()}


class _Sums:
    """Sums over images, all ``[blocks, ...]`` float64; one number a block and image is kept."""

    def __init__(self) -> None:
        self.images = 0
        self.grid: tuple[int, int] | None = None
        self.sums: dict[str, Tensor] = {}
        self.usage: list[Tensor] = []  # [B, blocks] each
        self.tokens: list[Tensor] = []

    def add(self, trace: Trace) -> None:
        """Add one batch."""
        if self.grid not in (None, trace.grid):
            raise ValueError(
                f"images must all have one size: a grid of {trace.grid} follows one of {self.grid}"
            )
        self.grid = trace.grid
        used, back = trace.used(), trace.brought_back()  # [blocks, B, patches]
        size = torch.stack([_sizes(block.mlp) for block in trace.blocks]) * used
        following = torch.zeros_like(used)
        following[:-1] = used[1:]
        for name, per_patch in (("used", used), ("size", size)):
            self._sum(name, per_patch.double().sum(1))
        for name, flags in (("out", ~used), ("back", back), ("at_once", back & following)):
            self._sum(name, flags.double().sum((1, 2)))
        self.usage.append(used.double().mean(2).T.cpu())
        self.tokens.append(torch.stack([_live(block.mlp) for block in trace.blocks], 1).cpu())
        self.images += used.shape[1]

    def _sum(self, name: str, values: Tensor) -> None:
        values = values.cpu()
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def result(self, model: ReducedViT) -> TokenStatistics:
        """Return the statistics; ValueError if there were no images."""
        if self.grid is None:
            raise ValueError("the data set gave no image, so there are no statistics")
        sums = self.sums
        # A position that is never used has no token; 1 means that nothing was merged.
        group = torch.where(sums["used"] > 0, sums["size"] / sums["used"].clamp_min(1), 1.0)
        state = torch.cat([sums["used"], sums["size"]], 1)
        before = torch.full_like(state, self.images)
        before[1:] = state[:-1]
        return TokenStatistics(
            method=repr(model.reducer),
            rate=rate_of(model),
            stages=tuple((state != before).any(1).nonzero().flatten().tolist()),
            keep=(sums["used"] / self.images).unflatten(1, self.grid).numpy(),
            group=group.unflatten(1, self.grid).numpy(),
            usage=torch.cat(self.usage).numpy(),
            tokens=torch.cat(self.tokens).double().numpy(),
            # Nothing over nothing is NaN.
            reactivation=(sums["back"] / sums["out"]).numpy(),
            at_once=(sums["at_once"] / sums["back"]).numpy(),
        )


def _sizes(state: TokenState) -> Tensor:
    """Count the patches of each patch's token, ``[B, patches]``; undefined for gone patches."""
    assert state.source is not None
    return state.layout.rect(state.patch_counts()).gather(1, state.source.clamp_min(0))


def _live(state: TokenState) -> Tensor:
    """Count the tokens of each image that take part, ``[B]``."""
    if state.alive is None:
        return torch.tensor(state.layout.lengths)
    return (state.alive.detach() > 0).sum(1).cpu()
