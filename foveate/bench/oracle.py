"""The oracle: it has a method's token counts, but takes the first tokens without any scoring.

No implementation of a schedule can be faster than its oracle by much, so the share of the oracle
says how much of the possible gain a method delivers. The oracle runs in the same driver as the
methods. Its counts come from a real pass of the method, and everything that can be made beforehand,
indices and layouts, is made beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from foveate.core import AttentionReader, Backbone, Layout, ReducedViT, Reducer, TokenState, Trace
from foveate.core.tokens import Parked

__all__ = ["Counts", "Oracle"]

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Tokens of each image in each block, prefix included.

    Attributes:
        attention: tokens that enter a block's attention.
        mlp: tokens that enter its feed-forward network.
        output: tokens that leave it.
        parked: whether other tokens waited during the block.
        waits: whether they still waited after it.
    """

    attention: tuple[Lengths, ...]
    mlp: tuple[Lengths, ...]
    output: tuple[Lengths, ...]
    parked: tuple[bool, ...]
    waits: tuple[bool, ...]

    @classmethod
    def of(cls, trace: Trace) -> Counts:
        """Read the counts off a pass of the method."""
        return cls(
            tuple(block.attention.layout.lengths for block in trace.blocks),
            tuple(block.mlp.layout.lengths for block in trace.blocks),
            tuple(block.output.layout.lengths for block in trace.blocks),
            tuple(block.attention.parked is not None for block in trace.blocks),
            tuple(block.output.parked is not None for block in trace.blocks),
        )

    @property
    def batch(self) -> int:
        """The number of images."""
        return len(self.mlp[0])

    def summary(self) -> dict[str, object]:
        """Summarise the counts of every block for the report."""
        last = self.mlp[-1]
        return {
            "fed_mean_per_block": [round(sum(n) / len(n), 1) for n in self.mlp],
            "fed_last_block_min": min(last),
            "fed_last_block_max": max(last),
        }


@dataclass
class _Take:
    """Takes the first tokens of every image: a slice where all have one count, else rows.

    ``source`` is the token of each patch afterwards, from which patches go back to the grid.
    """

    old: Lengths
    layout: Layout
    rows: Tensor | None
    source: Tensor

    @classmethod
    def of(
        cls, old: Lengths, new: Lengths, *, even: bool, grid: Tensor, device: torch.device
    ) -> _Take | None:
        """Return None if all tokens stay; ``grid`` has the places of patches in an image."""
        if old == new:
            return None
        layout = Layout.even(len(new), new[0]) if len(set(new)) == 1 else Layout.ragged(new)
        grows = any(has > had for had, has in zip(old, new, strict=True))  # patches come back
        rows = _first_rows(old, new, device) if grows or not even else None
        there = grid < torch.tensor(new)[:, None]
        return cls(old, layout, rows, torch.where(there, grid, -1).to(device))

    def __call__(self, state: TokenState) -> TokenState:
        changes = {"x": self._first(state.x), "layout": self.layout, "intact": False}
        if state.place is not None:
            changes["place"] = self._first(state.place)
        if state.source is not None:
            changes["source"] = self.source
        return state.replace(**changes)

    def _first(self, values: Tensor) -> Tensor:
        if self.rows is not None:
            return values.index_select(0, self.rows)
        count = self.layout.longest
        return values.unflatten(0, (len(self.old), -1))[:, :count].flatten(0, 1)

    def back(self, x: Tensor, full: Tensor) -> Tensor:
        """Put processed tokens back in front of those that waited."""
        if self.rows is not None:
            return full.index_copy(0, self.rows, x)
        images = len(self.old)
        waited = full.unflatten(0, (images, -1))[:, self.layout.longest :]
        return torch.cat([x.unflatten(0, (images, -1)), waited], 1).flatten(0, 1)


@dataclass
class _Step:
    """The changes around one block; None where no token leaves or returns."""

    before: _Take | None
    between: _Take | None
    after: _Take | None
    parks: bool
    back: bool
    recall: _Take | None


class _FirstTokens(Reducer):
    """Takes the first tokens wherever the method reduced them."""

    name = "oracle"
    hooks = ("before", "between", "after")

    def __init__(self, steps: list[_Step], even: bool) -> None:
        self.__post_init__()
        self.steps, self.even = steps, even

    @property
    def fixed_count(self) -> bool:
        """Whether all images have the same counts."""
        return self.even

    def before(self, block: int, state: TokenState) -> TokenState:
        """Take the tokens that enter attention; the others may wait."""
        step = self.steps[block]
        inner = state if step.before is None else step.before(state)
        if step.parks:
            inner = inner.replace(parked=Parked(state, state.layout.start(state.x.device)))
        return inner

    def acts_between(self, block: int) -> bool:
        """Return whether the method had fewer tokens after attention."""
        return self.steps[block].between is not None

    def between(self, block: int, state: TokenState, attention: AttentionReader) -> TokenState:
        """Take the tokens that are fed forward."""
        take = self.steps[block].between
        assert take is not None
        return take(state)

    def after(self, block: int, state: TokenState) -> TokenState:
        """Put waiting tokens back, or take those that leave."""
        step = self.steps[block]
        if step.back:
            assert state.parked is not None
            waiting = state.parked.state
            x = state.x if step.recall is None else step.recall.back(state.x, waiting.x)
            return waiting.replace(x=x, block=state.block)
        return state if step.after is None else step.after(state)


class Oracle(ReducedViT):
    """A backbone that keeps the first tokens, at given counts; its logits mean nothing.

    Args:
        backbone: backbone of any family.
        counts: tokens of every image in every block.
        grid: patch rows and columns.
        even: whether all images have the same counts.
        device: device of the tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        counts: Counts,
        grid: tuple[int, int],
        even: bool,
        device: torch.device,
    ) -> None:
        self.counts, self.even = counts, even
        prefix, patches = backbone.spec.prefix, grid[0] * grid[1]
        now = full = (patches + prefix,) * counts.batch
        take = partial(_Take.of, even=even, grid=prefix + torch.arange(patches), device=device)
        steps: list[_Step] = []
        for block, parked in enumerate(counts.parked):
            enter, fed = counts.attention[block], counts.mlp[block]
            # Tokens wait for one block, or for a stage of several.
            parks = parked and not (block > 0 and counts.waits[block - 1])
            full = now if parks else full
            back = parked and not counts.waits[block]
            steps.append(
                _Step(
                    before=take(now, enter),
                    between=take(enter, fed),
                    after=None if back else take(fed, counts.output[block]),
                    parks=parks,
                    back=back,
                    recall=take(full, fed) if back else None,
                )
            )
            now = counts.output[block]
        super().__init__(backbone, _FirstTokens(steps, even))

    @classmethod
    def of(cls, model: ReducedViT, trace: Trace, images: Tensor) -> Oracle:
        """Make the oracle with the counts of a traced pass of ``model`` over ``images``."""
        counts = Counts.of(trace)
        even = model.reducer.fixed_count or counts.batch == 1
        return cls(model.backbone, counts, trace.grid, even, images.device)


def _first_rows(old: Lengths, new: Lengths, device: torch.device) -> Tensor:
    """Return rows of the first ``new[b]`` of an image's ``old[b]`` tokens, the last repeated."""
    start, rows = 0, []
    for had, has in zip(old, new, strict=True):
        rows.append(start + torch.arange(has).clamp_max(max(had - 1, 0)))
        start += had
    return torch.cat(rows).to(device)
