"""Which patches of each image stay, for masked fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.train.draws import Draws

__all__ = ["draw_masks", "kept_patches"]


def kept_patches(patches: int, ratio: float) -> int:
    """Count the patches that stay when a share is hidden, rounded down but for float error."""
    return int(patches * (1 - ratio) + 1e-6)


def draw_masks(
    ratios: Sequence[float], batch: int, patches: int, draws: Draws, *, stratified: bool = False
) -> Tensor:
    """Draw the patches that stay, ``[batch, patches]`` bool, as each image's ratio says.

    Args:
        ratios: shares to hide; every image draws one of them.
        batch: images of this process.
        patches: of an image.
        draws: random numbers of the step.
        stratified: deal the ratios out in turn instead, over the batch of all processes.
    """
    counts = torch.tensor([kept_patches(patches, r) for r in ratios], device=draws.device)
    if stratified:
        place = torch.arange(batch, device=draws.device) + draws.rank * batch
        chosen = place % len(ratios)
    else:
        # Drawn even where there is one ratio, so that the noise after it stays the same.
        chosen = (draws.uniform(batch) * len(ratios)).long()
    order = draws.uniform(batch, patches).argsort(1).argsort(1)
    return order < counts[chosen][:, None]
