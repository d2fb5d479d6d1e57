"""What a method does to the tokens of a whole data set: where it keeps, how often it brings back.

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

import torch
from torch import Tensor, nn

from foveate.core import ReducedViT, TokenState, Trace
from foveate.evaluate.answers import Batches, evaluating

__all__ = ["Spread", "TokenStatistics", "gather", "token_statistics"]

Grid = tuple[tuple[float, ...], ...]
_QUANTILES = {"least": 0.0, "low": 0.05, "quarter": 0.25, "median": 0.5}
_QUANTILES |= {"three_quarters": 0.75, "high": 0.95, "most": 1.0}
_BINS = 20


@dataclass(frozen=True)
class Spread:
    """How a number differs from image to image.

    Attributes:
        mean, deviation: over the images; the deviation is that of the images themselves.
        least, low, quarter, median, three_quarters, high, most: quantiles 0, 5, 25, 50, 75, 95
            and 100 %.
        edges, counts: a histogram.
    """

    mean: float
    deviation: float
    least: float
    low: float
    quarter: float
    median: float
    three_quarters: float
    high: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of one model over a data set; lists go from the first block to the last.

    Attributes:
        method: with its options.
        images: how many were looked at.
        grid: rows and columns of patches.
        stages: blocks that use other patches, or in other groups, than the block before.
        keep: of each block, the share of images in which it uses the patch at each position.
        group: of each block, how many patches the token that carries each position stands for, a
            mean over the images in which it is used; 1 where nothing merged.
        depth: of each position, how many blocks use it, mean over images.
        usage: of each block, the share of patches that it uses, mean over images.
        usage_deviation: its standard deviation over images.
        reactivation: of the patches that a block leaves out, the share that a later block uses;
            None where a block leaves out none.
        at_once: of those used later, the share that the very next block uses.
        tokens: of each block, tokens that it feeds forward, prefix and fused ones included.
        tokens_per_image: mean over the blocks, image by image.
        last_tokens: tokens of the last block, image by image.
    """

    method: str
    images: int
    grid: tuple[int, int]
    stages: tuple[int, ...]
    keep: tuple[Grid, ...]
    group: tuple[Grid, ...]
    depth: Grid
    usage: tuple[float, ...]
    usage_deviation: tuple[float, ...]
    reactivation: tuple[float | None, ...]
    at_once: tuple[float | None, ...]
    tokens: tuple[float, ...]
    tokens_per_image: Spread
    last_tokens: Spread


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
    """``token_statistics`` of several models in one pass over the data."""
    sums: dict[str, tuple[ReducedViT, _Sums]] = {}
    for name, model in models.items():
        if not isinstance(model, ReducedViT):
            raise ValueError(
                "token statistics are of models from foveate.apply; a model without a method "
                "uses every patch in every block"
            )
        sums[name] = model, _Sums()
    with evaluating(*models.values(), precision=precision):
        for images, _, _ in batches():
            for model, total in sums.values():
                total.add(model.trace(images))
    return {name: total.result(repr(model.reducer)) for name, (model, total) in sums.items()}


class _Sums:
    """Sums over images, all ``[blocks, ...]`` float64; one number a block and image is kept."""

    def __init__(self) -> None:
        self.images = 0
        self.grid: tuple[int, int] | None = None
        self.sums: dict[str, Tensor] = {}
        self.usage: list[Tensor] = []  # [B, blocks] each
        self.tokens: list[Tensor] = []

    def add(self, trace: Trace) -> None:
        """Take one batch in."""
        if self.grid not in (None, trace.grid):
            raise ValueError(
                f"images must all have one size: a grid of {trace.grid} follows one of {self.grid}"
            )
        self.grid = trace.grid
        used = torch.stack([block.active() for block in trace.blocks])  # [blocks, B, patches]
        size = torch.stack([_sizes(block.mlp) for block in trace.blocks]) * used
        later = torch.zeros_like(used)  # whether any later block uses it
        for block in range(len(used) - 2, -1, -1):
            later[block] = later[block + 1] | used[block + 1]
        following = torch.zeros_like(used)
        following[:-1] = used[1:]
        back = ~used & later
        for name, per_patch in (("used", used), ("size", size)):
            self._sum(name, per_patch.double().sum(1))
        for name, flags in (("out", ~used), ("back", back), ("at_once", back & following)):
            self._sum(name, flags.double().sum((1, 2)))
        self.usage.append(used.float().mean(2).T.cpu())
        self.tokens.append(torch.stack([_live(block.mlp) for block in trace.blocks], 1).cpu())
        self.images += used.shape[1]

    def _sum(self, name: str, values: Tensor) -> None:
        values = values.cpu()
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def result(self, method: str) -> TokenStatistics:
        """What was gathered; ValueError where nothing was."""
        if self.grid is None:
            raise ValueError("the data set gave no image, so there are no statistics")
        sums, usage = self.sums, torch.cat(self.usage).double()
        tokens = torch.cat(self.tokens).double()
        keep = sums["used"] / self.images
        # Where a position is never used there is no token to speak of; 1 is what merges nothing.
        group = torch.where(sums["used"] > 0, sums["size"] / sums["used"].clamp_min(1), 1.0)
        state = torch.cat([sums["used"], sums["size"]], 1)
        before = torch.full_like(state, self.images)
        before[1:] = state[:-1]
        return TokenStatistics(
            method=method,
            images=self.images,
            grid=self.grid,
            stages=tuple((state != before).any(1).nonzero().flatten().tolist()),
            keep=tuple(self._rows(block) for block in keep),
            group=tuple(self._rows(block) for block in group),
            depth=self._rows(keep.sum(0)),
            usage=_plain(usage.mean(0)),
            usage_deviation=_plain(usage.std(0, correction=0)),
            reactivation=_ratios(sums["back"], sums["out"]),
            at_once=_ratios(sums["at_once"], sums["back"]),
            tokens=_plain(tokens.mean(0)),
            tokens_per_image=_spread(tokens.mean(1)),
            last_tokens=_spread(tokens[:, -1]),
        )

    def _rows(self, values: Tensor) -> Grid:
        assert self.grid is not None
        return tuple(_plain(row) for row in values.view(self.grid))


def _sizes(state: TokenState) -> Tensor:
    """Patches that the token of each patch stands for, ``[B, patches]``; anything where gone."""
    assert state.source is not None
    return state.layout.rect(state.patch_counts()).gather(1, state.source.clamp_min(0))


def _live(state: TokenState) -> Tensor:
    """Tokens of each image that take part, ``[B]``."""
    if state.alive is None:
        return torch.tensor(state.layout.lengths)
    return (state.alive.detach() > 0).sum(1).cpu()


def _ratios(part: Tensor, whole: Tensor) -> tuple[float | None, ...]:
    return tuple(
        _short(p / w) if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)
    )


def _spread(values: Tensor) -> Spread:
    """Quantiles and a histogram of one number an image."""
    points = torch.quantile(values, torch.tensor(list(_QUANTILES.values())).to(values))
    named: dict[str, Any] = dict(zip(_QUANTILES, _plain(points), strict=True))
    least, most = float(values.min()), float(values.max())
    counts, edges = torch.histogram(
        values,
        bins=_BINS if most > least else 1,
        range=(least, most if most > least else least + 1),
    )
    return Spread(
        mean=_short(float(values.mean())),
        deviation=_short(float(values.std(correction=0))),
        **named,
        edges=_plain(edges),
        counts=tuple(map(int, counts.tolist())),
    )


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(map(_short, values.tolist()))


def _short(value: float) -> float:
    """Six decimals: files of maps stay readable."""
    return round(value, 6)
