"""Oracles: a method's token counts by taking the first tokens, without any scoring.

No implementation of a schedule can be faster than its oracle by much, so the share of the oracle
says how much of the possible gain a method delivers. Counts come from a real pass of the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.core import Layout, ReducedViT, TokenState, attend
from foveate.core.driver import Trace

__all__ = ["Counts", "PackedOracle", "SliceOracle", "oracle_for"]

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Tokens of each image in each block, prefix included.

    Attributes:
        attended: those that a block attended over.
        fed: those that it fed forward.
        parked: whether the block's other tokens waited and came back after it.
    """

    attended: tuple[Lengths, ...]
    fed: tuple[Lengths, ...]
    parked: tuple[bool, ...]

    @classmethod
    def of(cls, trace: Trace) -> Counts:
        """Read the counts off a pass of the method."""
        return cls(
            tuple(block.attended.layout.lengths for block in trace.blocks),
            tuple(block.fed.layout.lengths for block in trace.blocks),
            tuple(block.attended.outer is not None for block in trace.blocks),
        )

    def first_image(self) -> Counts:
        """The counts of one image, for methods that treat all alike."""
        return Counts(
            tuple(lengths[:1] for lengths in self.attended),
            tuple(lengths[:1] for lengths in self.fed),
            self.parked,
        )

    def summary(self) -> dict[str, object]:
        """Mean and extreme counts of every block, for the report."""
        last = self.fed[-1]
        return {
            "fed_mean_per_block": [round(sum(n) / len(n), 1) for n in self.fed],
            "fed_last_block_min": min(last),
            "fed_last_block_max": max(last),
            "parked_blocks": [block for block, parked in enumerate(self.parked) if parked],
        }


class _Oracle(nn.Module):
    """Embedding and head as timm has them."""

    def __init__(self, vit: nn.Module, counts: Counts) -> None:
        super().__init__()
        self.vit = vit
        self.counts = counts

    def _embed(self, images: Tensor) -> Tensor:
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


class SliceOracle(_Oracle):
    """The stock blocks, with ``x[:, :n]`` where the method reduces; one count for all images."""

    def __init__(self, vit: nn.Module, counts: Counts) -> None:
        super().__init__(vit, counts.first_image())
        one = self.counts
        self.steps = [
            (attended[0], fed[0], parked)
            for attended, fed, parked in zip(one.attended, one.fed, one.parked, strict=True)
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of no meaning, in the least time."""
        x = self._embed(images)
        for block, (attended, fed, parked) in zip(self.vit.blocks, self.steps, strict=True):
            if parked:
                # One pass over the full tensor: the waiting tokens and the block's result.
                x = torch.cat([block(x[:, :attended]), x[:, attended:]], 1)
                continue
            if attended < x.shape[1]:
                x = x[:, :attended]
            if fed == attended:
                x = block(x)
            else:
                x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
                x = x[:, :fed]
                x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return self.vit.forward_head(self.vit.norm(x))


@dataclass
class _Step:
    """One block of the packed oracle; rows are None where nothing is taken away."""

    layout: Layout
    before: Tensor | None
    between: Tensor | None
    parked: bool


class PackedOracle(_Oracle):
    """Packed tokens and the package's own packed attention, with every index made beforehand.

    Layouts are made once and kept, so whatever the package caches in them costs nothing here, and
    where all images have one count the layout is even. Lengths need no look at the device.
    """

    def __init__(self, model: ReducedViT, counts: Counts, device: torch.device) -> None:
        super().__init__(model.vit, counts)
        self._backbone = model.backbone
        spec = model.backbone.spec
        self.prefix, self.grid = spec.prefix, spec.grid
        full = (self.grid[0] * self.grid[1] + self.prefix,) * len(counts.fed[0])
        self.steps, now = [], full
        rows = zip(counts.attended, counts.fed, counts.parked, strict=True)
        for attended, fed, parked in rows:
            before = _first_rows(now, attended, device)
            between = _first_rows(attended, fed, device)
            self.steps.append(_Step(_layout(attended), before, between, parked))
            now = now if parked else fed
        self.cls_rows = _layout(now).start(device)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of no meaning, in the least time."""
        x, parts = self._embed(images).flatten(0, 1), self._backbone
        for block, step in enumerate(self.steps):
            full = x
            if step.before is not None:
                x = x.index_select(0, step.before)
            heads = parts.qkv(block, x, None)
            state = TokenState(x, step.layout, self.prefix, self.grid)
            x = x + parts.project(block, attend(heads, state), heads)
            if step.between is not None:
                x = x.index_select(0, step.between)
            x = x + parts.feedforward(block, x)
            if step.parked and step.before is not None:
                x = full.index_copy(0, step.before, x)
        x = self.vit.norm(x).index_select(0, self.cls_rows)
        return self.vit.forward_head(x[:, None])


def _layout(lengths: Lengths) -> Layout:
    if len(set(lengths)) == 1:
        return Layout.even(len(lengths), lengths[0])
    return Layout.ragged(lengths)


def _first_rows(old: Lengths, new: Lengths, device: torch.device) -> Tensor | None:
    """Rows of the first ``new[b]`` of the ``old[b]`` tokens of every image; None for all."""
    if old == new:
        return None
    start, rows = 0, []
    for had, has in zip(old, new, strict=True):
        rows.append(torch.arange(start, start + has))
        start += had
    return torch.cat(rows).to(device)


def oracle_for(model: ReducedViT, trace: Trace) -> SliceOracle | PackedOracle:
    """The oracle of the schedule that a traced pass of ``model`` had."""
    counts = Counts.of(trace)
    if model.reducer.fixed_count or len(counts.fed[0]) == 1:
        return SliceOracle(model.vit, counts)
    return PackedOracle(model, counts, trace.logits.device)
