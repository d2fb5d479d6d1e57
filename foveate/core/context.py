"""Context: what stays the same from the first block of a forward pass to the last."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor

__all__ = ["MODES", "Context"]

MODES = ("auto", "masked", "gathered", "packed")


@dataclass(frozen=True, eq=False)
class Context:
    """Facts about one forward pass, set when it begins.

    Attributes:
        prefix: class, distillation and register tokens in front of each image's patches.
        grid: rows and columns of the patch grid.
        mode: "masked", "gathered" or "packed".
        training: whether the reduced model was in training mode.
        mask: patches that take part, ``[B, H*W]`` bool; None means all of them.
        original: number of patches that each image starts with; None means the whole grid.
        rotary: table of rotary positions (see ``Embedded``), or None. Where images differ in size
            it holds a table for each of them, one after another.
        grids: rows and columns of each image's own grid, if exactly its patches take part; None if
            every image fills the common grid or a keep mask chose the patches.
    """

    prefix: int
    grid: tuple[int, int]
    mode: str = "gathered"
    training: bool = False
    mask: Tensor | None = None
    original: tuple[int, ...] | None = None
    rotary: Tensor | None = None
    grids: tuple[tuple[int, int], ...] | None = None

    def removed(self, r: int | float) -> int | list[int]:
        """Return ``r`` as a number of patches; a float is a share of the patches at the start.

        The result is a list if images start with different numbers of patches and their shares
        differ.
        """
        if isinstance(r, int):
            return r
        if self.original is None:
            return operator.index(round(r * self.patches))  # see ``Schedule.count``
        each = [round(r * count) for count in self.original]
        return each[0] if len(set(each)) == 1 else each

    @property
    def patches(self) -> int:
        """Number of cells of the patch grid."""
        return self.grid[0] * self.grid[1]
