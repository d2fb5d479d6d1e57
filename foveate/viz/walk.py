"""Draw one image's patches block by block: kept, merged, waiting for a later block or left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from foveate.core import Trace
from foveate.viz.answers import LONGEST
from foveate.viz.grid import Box, Panel, as_image, laid, shrunk
from foveate.viz.layout import Key
from foveate.viz.steps import Step, steps
from foveate.viz.tokens import (
    LEFT_OUT,
    MERGED,
    SUMS_UP,
    WAITS,
    later_used,
    with_groups,
    with_waiting,
)

__all__ = ["Walk"]


@dataclass(frozen=True)
class Walk:
    """The patches of an image, block by block. Pictures are drawn only when asked for.

    Attributes:
        base: the image as it is drawn, with its patches.
        found: the tokens of each block.
        waits: for each block the patches that it leaves out and a later one uses, ``[H*W]`` bool.
    """

    base: Panel
    found: list[Step]
    waits: list[np.ndarray]

    @classmethod
    def of(cls, trace: Trace, image: Any, *, index: int = 0, box: Box | None = None) -> Walk:
        """Read a trace.

        Args:
            trace: a result of ``ReducedViT.trace``, or of a dense model.
            image: path, PIL image or uint8 pixels.
            index: number of the image in the trace.
            box: part of the image that its patches cover, in pixels; None is the whole image.
        """
        picture, box = shrunk(as_image(image), LONGEST, box)
        found = steps(trace, index)
        waits = [
            later & ~step.working for later, step in zip(later_used(found), found, strict=True)
        ]
        return cls(laid(trace, index, picture, box, 1), found, waits)

    def __len__(self) -> int:
        """Return the number of steps: the blocks, and one more if the last one drops tokens."""
        return len(self.found)

    def picture(self, number: int) -> Image.Image:
        """Draw the patches of one step."""
        step, waits = self.found[number], self.waits[number]
        drawn = with_groups(self.base, step)
        return (with_waiting(drawn, self.base, step, waits) if waits.any() else drawn).image()

    def words(self, number: int) -> str:
        """Say what one step works on."""
        step, waits = self.found[number], int(self.waits[number].sum())
        said = [f"{int(step.working.sum())} of {step.patches} patches in {step.tokens} tokens"]
        if step.merged.any():
            said.append(f"{len(np.unique(step.group[step.merged]))} merged groups")
        if waits:
            said.append(f"{waits} brought back later")
        if step.extra:
            said.append(f"{step.extra} of the tokens sum{'s' * (step.extra == 1)} up others")
        return ", ".join(said)

    def legend(self) -> list[Key]:
        """Return the legend's entries for the colours that occur."""
        occurs = {
            LEFT_OUT: any(
                bool((step.left_out & ~waits).any())
                for step, waits in zip(self.found, self.waits, strict=True)
            ),
            MERGED: any(step.merged.any() for step in self.found),
            WAITS: any(waits.any() for waits in self.waits),
            SUMS_UP: any(step.extra for step in self.found),
        }
        return [key for key, found in occurs.items() if found]
