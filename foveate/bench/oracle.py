"""The oracle: a method's token counts by taking the first tokens, without any scoring.

No implementation of a schedule can be faster than its oracle by much, so the share of the oracle
says how much of the possible gain a method delivers. Counts come from a real pass of the method,
and everything that can be made beforehand is: indices, layouts, rotary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.core import Backbone, Embedded, Layout, ReducedViT, TokenState, attend
from foveate.core.driver import Trace

__all__ = ["Counts", "Oracle"]

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Tokens of each image in each block, prefix included.

    Attributes:
        attended: those that a block attended over.
        fed: those that it fed forward.
        left: those that it left.
        parked: whether other tokens waited during the block.
        waits: whether they still waited after it.
    """

    attended: tuple[Lengths, ...]
    fed: tuple[Lengths, ...]
    left: tuple[Lengths, ...]
    parked: tuple[bool, ...]
    waits: tuple[bool, ...]

    @classmethod
    def of(cls, trace: Trace) -> Counts:
        """Read the counts off a pass of the method."""
        return cls(
            tuple(block.attended.layout.lengths for block in trace.blocks),
            tuple(block.fed.layout.lengths for block in trace.blocks),
            tuple(block.left.layout.lengths for block in trace.blocks),
            tuple(block.attended.outer is not None for block in trace.blocks),
            tuple(block.left.outer is not None for block in trace.blocks),
        )

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.fed[0])

    def summary(self) -> dict[str, object]:
        """Mean and extreme counts of every block, for the report."""
        last = self.fed[-1]
        return {
            "fed_mean_per_block": [round(sum(n) / len(n), 1) for n in self.fed],
            "fed_last_block_min": min(last),
            "fed_last_block_max": max(last),
            "parked_blocks": [block for block, parked in enumerate(self.parked) if parked],
        }


@dataclass
class _Take:
    """The first tokens of every image: a slice where all have one count, else rows."""

    old: Lengths
    new: Lengths
    rows: Tensor | None

    @classmethod
    def of(cls, old: Lengths, new: Lengths, even: bool, device: torch.device) -> _Take | None:
        """None where all tokens stay."""
        if old == new:
            return None
        return cls(old, new, None if even else _first_rows(old, new, device))

    def __call__(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return x.index_select(0, self.rows)
        return x.unflatten(0, (len(self.old), -1))[:, : self.new[0]].flatten(0, 1)

    def back(self, x: Tensor, full: Tensor) -> Tensor:
        """Put processed tokens back in front of those that waited."""
        if self.rows is not None:
            return full.index_copy(0, self.rows, x)
        images = len(self.old)
        waited = full.unflatten(0, (images, -1))[:, self.new[0] :]
        return torch.cat([x.unflatten(0, (images, -1)), waited], 1).flatten(0, 1)


@dataclass
class _Step:
    """What happens around one block; None where nothing does."""

    before: _Take | None
    between: _Take | None
    after: _Take | None
    parks: bool
    recall: _Take | None
    layout: Layout
    rotary: Tensor | None


class Oracle(nn.Module):
    """The parts of a backbone, in the least time for given token counts; its logits mean nothing.

    Args:
        backbone: of any family.
        counts: tokens of every image in every block.
        grid: patch rows and columns.
        embedded: embedded images, for rotary positions.
        even: all images have the same counts.
    """

    def __init__(
        self,
        backbone: Backbone,
        counts: Counts,
        grid: tuple[int, int],
        embedded: Embedded,
        even: bool,
    ) -> None:
        super().__init__()
        self._backbone, self.counts, self.grid, self.even = backbone, counts, grid, even
        device = embedded.x.device
        tokens = grid[0] * grid[1] + backbone.spec.prefix
        now = full = (tokens,) * counts.batch
        self.steps: list[_Step] = []
        for block, parked in enumerate(counts.parked):
            attended, fed, left = counts.attended[block], counts.fed[block], counts.left[block]
            # Tokens wait for one block, or for a stage of several.
            parks = parked and not (block > 0 and counts.waits[block - 1])
            full = now if parks else full
            back = parked and not counts.waits[block]
            self.steps.append(
                _Step(
                    before=_Take.of(now, attended, even, device),
                    between=_Take.of(attended, fed, even, device),
                    after=None if back else _Take.of(fed, left, even, device),
                    parks=parks,
                    recall=_Take.of(full, fed, even, device) if back else None,
                    layout=_layout(attended),
                    rotary=self._rotary(block, attended, embedded.table),
                )
            )
            now = left
        self.layout = _layout(now)

    @classmethod
    @torch.no_grad()
    def of(cls, model: ReducedViT, trace: Trace, images: Tensor) -> Oracle:
        """The oracle of the counts that a traced pass of ``model`` over ``images`` had."""
        backbone, counts = model.backbone, Counts.of(trace)
        even = model.reducer.fixed_count or counts.batch == 1
        return cls(backbone, counts, trace.grid, backbone.embed(images), even)

    def _rotary(self, block: int, lengths: Lengths, table: Tensor | None) -> Tensor | None:
        """Rotary rows of the first tokens of every image."""
        if table is None:
            return None
        rows = table[block] if table.ndim == 4 else table
        prefix, patches = self._backbone.spec.prefix, self.grid[0] * self.grid[1]
        places = [[patches] * prefix + list(range(n - prefix)) for n in lengths]
        flat = torch.tensor([place for image in places for place in image], device=table.device)
        return rows.index_select(0, flat.clamp_max(patches))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of no meaning."""
        parts = self._backbone
        prefix, grid = parts.spec.prefix, self.grid
        x = full = parts.embed(images).x.flatten(0, 1)
        for block, step in enumerate(self.steps):
            if step.parks:
                full = x
            if step.before is not None:
                x = step.before(x)
            heads = parts.qkv(block, x, step.rotary)
            out = attend(heads, TokenState(x, step.layout, prefix, grid))
            x = x + parts.project(block, out, heads)
            del heads, out  # they would stay while the feed forward needs most memory
            if step.between is not None:
                x = step.between(x)
            x = x + parts.feedforward(block, x)
            if step.recall is not None:
                x = step.recall.back(x, full)
            elif step.after is not None:
                x = step.after(x)
        return parts.head(TokenState(parts.norm(x), self.layout, prefix, grid))


def _layout(lengths: Lengths) -> Layout:
    if len(set(lengths)) == 1:
        return Layout.even(len(lengths), lengths[0])
    return Layout.ragged(lengths)


def _first_rows(old: Lengths, new: Lengths, device: torch.device) -> Tensor:
    """Rows of the first ``new[b]`` of the ``old[b]`` tokens of every image."""
    start, rows = 0, []
    for had, has in zip(old, new, strict=True):
        rows.append(torch.arange(start, start + has))
        start += had
    return torch.cat(rows).to(device)
