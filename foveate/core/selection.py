"""Selection: which tokens of each image are selected, and in which order.

A selection is a rectangle of positions ``[B, K]``. Where images select different numbers of
tokens, the entries that count stand on the left of each row and the rest is padding. Only this
file packs entries to the left, so no other code can leave a hole between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.ops import highest_first, marked_first

__all__ = ["Selection"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Positions of the selected tokens of each image.

    Attributes:
        index: positions ``[B, K]`` in their new order.
        lengths: number of entries that count in each row; None when all of them do.
    """

    index: Tensor
    lengths: tuple[int, ...] | None = None

    @classmethod
    def checked(cls, index: Tensor, valid: Tensor | None = None) -> Selection:
        """Make a selection from positions and a mask ``[B, K]`` of the entries that count.

        Raises ValueError if an entry that counts stands behind one that does not.
        """
        if valid is None:
            return cls(index)
        if valid.shape != index.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be bool {list(index.shape)} like the positions, got {valid.dtype} "
                f"{list(valid.shape)}"
            )
        holes = (valid[:, 1:] & ~valid[:, :-1]).any(1)
        if bool(holes.any()):
            raise ValueError(
                f"the selection of image {int(holes.nonzero()[0])} has a hole: entries that count "
                "must come first"
            )
        return cls(index, tuple(valid.sum(1).tolist()))

    @classmethod
    def best(cls, score: Tensor, k: int | Sequence[int]) -> Selection:
        """Select the ``k`` highest of each row of ``score [B, N]``, best first.

        ``k`` is one number for all images or one for each.
        """
        if isinstance(k, Sequence):
            return cls(score.topk(max(k), dim=1).indices, tuple(k))
        return cls(score.topk(k, dim=1).indices)

    @classmethod
    def split(
        cls, score: Tensor, k: int | Sequence[int], present: Tensor | None = None
    ) -> tuple[Selection, Selection]:
        """Split each row of ``score [B, N]`` into its ``k`` highest and the rest, in order.

        ``present [B, N]`` marks the positions that hold a token; the others must score lowest.
        """
        if isinstance(k, Sequence) or present is not None:
            best = cls.best(score, k)
            return best, best.complement(score.shape[1], present)
        order = highest_first(score)
        return cls(order[:, :k]), cls(order[:, k:].sort(dim=1).values)

    @classmethod
    def where(cls, mask: Tensor) -> Selection:
        """Select the true cells of ``mask [B, N]`` in order, any number in each image."""
        if len(mask) == 1:  # a single image needs no padding
            index = mask[0].nonzero().mT
            return cls(index, (index.shape[1],))
        counts = mask.sum(1).tolist()
        return cls(_first(mask, max(counts)), tuple(counts))

    def complement(self, count: int, present: Tensor | None = None) -> Selection:
        """Select what this selection leaves out of ``range(count)``, in ascending order.

        ``present [B, count]`` marks the positions that hold a token.
        """
        free = self.index.new_ones((self.index.shape[0], count), dtype=torch.bool)
        if self.lengths is None and present is None:
            free = free.scatter(1, self.index, False)
            return Selection(_first(free, count - self.index.shape[1]))
        # An extra cell takes the writes of entries that do not count.
        free = torch.cat([free, free[:, :1]], 1)
        free = free.scatter(1, self.slots(count), False)[:, :count]
        return Selection.where(free if present is None else free & present)

    @property
    def valid(self) -> Tensor | None:
        """Mask of the entries that count, ``[B, K]`` bool; None when all of them do."""
        if self.lengths is None:
            return None
        return self._columns() < self._lengths_tensor()

    @property
    def size(self) -> int | Tensor:
        """Number of selected tokens: an int, or ``[B, 1]`` where images differ."""
        return self.index.shape[1] if self.lengths is None else self._lengths_tensor()

    def fewer_than(self, counts: Sequence[int]) -> Tensor | None:
        """Mark the images that select fewer than ``counts``, ``[B]``; None where all do."""
        if self.lengths is None:
            return None
        fewer = [k < n for k, n in zip(self.lengths, counts, strict=True)]
        return torch.tensor(fewer, device=self.index.device)

    def slots(self, spare: int) -> Tensor:
        """Return the positions, with ``spare`` in place of the entries that do not count."""
        valid = self.valid
        return self.index if valid is None else torch.where(valid, self.index, spare)

    def of(self, positions: Tensor) -> Selection:
        """Select the positions found in the selected columns of ``positions [B, N]``."""
        return Selection(positions.gather(1, self.index), self.lengths)

    def then(self, *others: Selection) -> Selection:
        """Select this selection's tokens, followed by those of the others in turn."""
        parts = (self, *others)
        index = torch.cat([s.index for s in parts], 1)
        if all(s.lengths is None for s in parts):
            return Selection(index)
        counted = [
            s.index.new_ones(s.index.shape, dtype=torch.bool) if (v := s.valid) is None else v
            for s in parts
        ]
        found = Selection.where(torch.cat(counted, 1))
        return found.of(index)

    def behind(self, prefix: int) -> Selection:
        """Select the first ``prefix`` tokens, followed by these, which are counted after them."""
        if prefix == 0:
            return self
        index = self.index + prefix
        if prefix == 1:
            index = F.pad(index, (1, 0))  # the first token has number 0
        else:
            front = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
            index = torch.cat([front, index], 1)
        lengths = self.lengths
        return Selection(index, None if lengths is None else tuple(n + prefix for n in lengths))

    def _columns(self) -> Tensor:
        return torch.arange(self.index.shape[1], device=self.index.device)

    def _lengths_tensor(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.index.device)[:, None]


def _first(mask: Tensor, count: int) -> Tensor:
    """Return the positions of the true cells of each row, ``[B, count]``, then padding."""
    # A sort gives a result whose size does not depend on the values.
    return marked_first(mask)[:, :count]
