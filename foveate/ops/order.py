"""Sort tokens so that equal ones keep their order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["highest_first", "marked_first"]

# Torch's ONNX exporter has no stable sort, so an exported graph sorts without that flag. Marks tie
# all the time, so ``marked_first`` sorts by position there. Scores seldom tie: runtimes for ONNX
# keep equal ones in order anyway, and our writer of .pt2 files sets the flag again. Torch 2.9 takes
# a compiled function for an exported one, so there it sorts without the flag too.


def highest_first(score: Tensor) -> Tensor:
    """Return the positions of each row of ``score [B, N]``, highest first.

    In a program that ``torch.export`` makes, and compiled by torch 2.9, the order of equal scores
    is not promised.
    """
    if torch.compiler.is_exporting():
        return score.sort(dim=1, descending=True).indices
    return score.sort(dim=1, descending=True, stable=True).indices


def marked_first(mask: Tensor) -> Tensor:
    """Return the positions of each row of ``mask [B, N]``, marked ones first."""
    if not torch.compiler.is_exporting():
        return (~mask).to(torch.uint8).sort(dim=1, stable=True).indices
    count = mask.shape[1]
    place = torch.arange(count, device=mask.device)
    return torch.where(mask, place, place + count).argsort(dim=1)
