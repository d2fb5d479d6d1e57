"""The result of a forward pass, and the trace that records every block of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.embedding import own_patches
from foveate.core.tokens import TokenState

__all__ = ["BlockTrace", "Outcome", "Recorder", "Trace"]


@dataclass(eq=False)
class Outcome:
    """Logits and final, normed tokens of one forward pass."""

    logits: Tensor
    state: TokenState

    @property
    def notes(self) -> Mapping[str, Any]:
        """Values that the method left for losses and traces."""
        return self.state.notes


@dataclass(eq=False)
class BlockTrace:
    """The tokens of one block.

    Attributes:
        attention: the tokens that enter attention.
        mlp: the tokens that enter the feed forward.
        output: the tokens that leave the block.
    """

    attention: TokenState
    mlp: TokenState
    output: TokenState

    def active(self) -> Tensor:
        """Mark the patches that the feed forward worked on, ``[B, H*W]`` bool."""
        source, alive = self.mlp.source, self.mlp.alive
        assert source is not None
        here = source >= 0
        if alive is not None:
            here = here & (alive.detach().gather(1, source.clamp_min(0)) > 0)
        return here


class Recorder:
    """Collects the tokens that ``step`` shows to its watcher.

    Attributes:
        blocks: one record for each block that was watched to its end.
    """

    def __init__(self) -> None:
        self.blocks: list[BlockTrace] = []
        self._seen: dict[str, TokenState] = {}

    def watch(self, name: str, state: TokenState) -> None:
        """Record the tokens at "attention", "mlp" and "output" of a block."""
        self._seen[name] = state
        if name == "output":
            self.blocks.append(BlockTrace(**self._seen))
            self._seen = {}


@dataclass(eq=False)
class Trace:
    """Record of one forward pass, for pictures, statistics and tests."""

    logits: Tensor
    grid: tuple[int, int]
    blocks: list[BlockTrace]
    final: TokenState

    @property
    def notes(self) -> Mapping[str, Any]:
        """Values that the method left for losses and traces."""
        return self.final.notes

    def __repr__(self) -> str:
        return f"Trace(grid={self.grid}, tokens per block: {self.counts()})"

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Patch rows and columns of each image; those of the common grid unless sizes differ."""
        state = self.blocks[0].attention
        return state.context.grids or (self.grid,) * state.batch

    def own(self) -> Tensor:
        """Mark the patches of the common grid that lie in each image, ``[B, H*W]`` bool."""
        return own_patches(self.grids, self.grid, self.blocks[0].attention.x.device)

    def used(self) -> Tensor:
        """Mark the patches that each block worked on, ``[blocks, B, H*W]`` bool."""
        return torch.stack([block.active() for block in self.blocks])

    def brought_back(self) -> Tensor:
        """Mark patches that a block leaves out and a later one uses, ``[blocks, B, H*W]`` bool."""
        used = self.used()
        later = torch.zeros_like(used)
        for block in range(len(used) - 2, -1, -1):
            later[block] = later[block + 1] | used[block + 1]
        return ~used & later

    def depth(self) -> Tensor:
        """Count the blocks that worked on each patch, ``[B, H*W]``."""
        return self.used().sum(0)

    def counts(self) -> list[tuple[int, ...]]:
        """Return the number of tokens in each block's feed forward, per image, prefix included."""
        return [block.mlp.layout.lengths for block in self.blocks]
