"""Read from a trace which token carries each patch of an image, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foveate.core import TokenState, Trace
from foveate.viz.grid import check_index

__all__ = ["Step", "changes", "live_tokens", "steps"]


@dataclass(frozen=True)
class Step:
    """The tokens that entered one block's feed forward, or that the last block returned.

    Attributes:
        label: name of the block in captions.
        carrier: for each patch the working token that carries it, ``[H*W]``; -1 = none.
        tokens: number of working tokens, prefix included.
        extra: number of working tokens without a patch: fused, package, representative.
        hue: number of the colour of each patch's group, ``[H*W]``. If groups merge, the largest
            one keeps its colour, so colours change little from block to block.
        own: patches of the grid that lie in the image, ``[H*W]`` bool; the others are padding.
    """

    label: str
    carrier: np.ndarray
    tokens: int
    extra: int
    hue: np.ndarray
    own: np.ndarray

    @cached_property
    def left_out(self) -> np.ndarray:
        """Return which patches of the image take no part, ``[H*W]`` bool."""
        return self.own & ~self.working

    @property
    def patches(self) -> int:
        """Return how many patches the image has."""
        return int(self.own.sum())

    @cached_property
    def working(self) -> np.ndarray:
        """Return which patches take part, ``[H*W]`` bool."""
        return self.carrier >= 0

    @cached_property
    def group(self) -> np.ndarray:
        """Return for each patch the first patch of its group, ``[H*W]``; -1 = none."""
        _, first, back = np.unique(self.carrier, return_index=True, return_inverse=True)
        return np.where(self.working, first[back.reshape(-1)], -1)

    @cached_property
    def merged(self) -> np.ndarray:
        """Return which patches share their token with others, ``[H*W]`` bool."""
        count = np.bincount(self.group[self.working], minlength=len(self.group))
        return self.working & (count[self.group] > 1)


def steps(trace: Trace, index: int = 0) -> list[Step]:
    """Make one step per block, and one more if the last block drops tokens after its MLP."""
    index = check_index(trace, index)
    states = [(block.mlp, f"block {n}") for n, block in enumerate(trace.blocks)]
    last = trace.blocks[-1].output
    if last.layout.lengths[index] < states[-1][0].layout.lengths[index]:
        states.append((last, f"after block {len(trace.blocks) - 1}"))
    found: list[Step] = []
    hue, own = np.arange(trace.grid[0] * trace.grid[1]), trace.own()[index].cpu().numpy()
    for state, label in states:
        found.append(_step(state, index, label, hue, own))
        hue = found[-1].hue
    return found


def changes(found: list[Step], field: str) -> list[Step]:
    """Return the steps at which a field changes: the stages of a method."""
    before = found[0].own
    if field == "group":
        before = np.where(before, np.arange(len(before)), -1)
    stages = []
    for step in found:
        now = getattr(step, field)
        if not np.array_equal(now, before):
            stages.append(step)
        before = now
    return stages


def live_tokens(state: TokenState, index: int) -> np.ndarray:
    """Return which tokens of an image take part, ``[N]`` bool."""
    if state.alive is None:
        return np.ones(state.layout.lengths[index], dtype=bool)
    return (state.alive[index].detach() > 0).cpu().numpy()


def _step(state: TokenState, index: int, label: str, hue: np.ndarray, own: np.ndarray) -> Step:
    assert state.source is not None
    live = live_tokens(state, index)
    source = state.source[index].cpu().numpy()
    working = source >= 0
    working[working] = live[source[working]]
    carrier = np.where(working, source, -1)
    return Step(
        label=label,
        carrier=carrier,
        tokens=int(live.sum()),
        extra=int((live & _carries_none(state, index)).sum()),
        hue=_hues(carrier, hue),
        own=own,
    )


def _hues(carrier: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Give each group the most common colour of its patches; idle patches keep theirs."""
    hue = before.copy()
    for token in np.flatnonzero(np.bincount(carrier[carrier >= 0]) > 1):  # the others keep theirs
        members = carrier == token
        colours, counts = np.unique(before[members], return_counts=True)
        hue[members] = colours[counts.argmax()]
    return hue


def _carries_none(state: TokenState, index: int) -> np.ndarray:
    """Return which tokens are not prefix tokens and never carried a patch, ``[N]`` bool."""
    length = state.layout.lengths[index]
    if state.parked is not None:
        # Prefix tokens may be parked too, so look each token up in the state before parking.
        begin = sum(state.layout.lengths[:index])
        rows = state.parked.rows[begin : begin + length].cpu().numpy()
        waiting = state.parked.state
        outside = _carries_none(waiting, index)
        return (rows < 0) | outside[np.maximum(rows - sum(waiting.layout.lengths[:index]), 0)]
    assert state.source is not None
    carried = state.source[index].cpu().numpy()
    none = np.ones(length, dtype=bool)
    none[carried[carried >= 0]] = False
    none[: state.prefix] = False
    return none
