"""Orders of tokens in which equal ones stay as they stand, also in an exported graph."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["highest_first", "marked_first"]

# Torch's exporter to ONNX has no stable sort. So a graph sorts without that flag: scores hardly
# ever tie, and ONNX keeps equal values in their order anyway; marks tie all the time and are told
# apart by their place.


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
