"""Sort tokens so that equal ones keep their order, also in an exported graph."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["highest_first", "marked_first"]

# Torch's ONNX exporter has no stable sort, so a graph sorts without that flag. Scores hardly ever
# tie, and ONNX keeps the order of equal values anyway. Marks tie all the time, so ``marked_first``
# sorts by position too.


def highest_first(score: Tensor) -> Tensor:
    """Return the positions of each row of ``score [B, N]``, highest first."""
    if torch.compiler.is_compiling():
        return score.argsort(dim=1, descending=True)
    return score.argsort(dim=1, descending=True, stable=True)


def marked_first(mask: Tensor) -> Tensor:
    """Return the positions of each row of ``mask [B, N]``, marked ones first."""
    if not torch.compiler.is_compiling():
        return (~mask).to(torch.uint8).sort(dim=1, stable=True).indices
    count = mask.shape[1]
    place = torch.arange(count, device=mask.device)
    return torch.where(mask, place, place + count).argsort(dim=1)
