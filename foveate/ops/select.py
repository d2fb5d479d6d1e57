"""Which tokens stay: top-k over score rectangles, and what is left over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["complement", "top_k"]


def top_k(score: Tensor, k: int | Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Pick the best ``k`` of each row of ``score [B, N]``, best first.

    With one ``k`` for all rows the answer is ``idx [B, k]`` and None. With one per row it is
    ``idx [B, max(k)]`` and a mask of the entries that count.
    """
    if isinstance(k, int):
        return score.topk(k, dim=1).indices, None
    idx = score.topk(max(k), dim=1).indices
    rank = torch.arange(idx.shape[1], device=idx.device)
    return idx, rank < torch.tensor(list(k), device=idx.device)[:, None]


def complement(
    idx: Tensor,
    count: int,
    valid: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """List the positions of ``range(count)`` that ``idx [B, K]`` leaves out, in ascending order.

    ``valid`` says which entries of ``idx`` count and ``present [B, count]`` which positions hold
    a token at all; with either, the answer comes with a mask of its own.
    """
    batch = idx.shape[0]
    taken = torch.zeros(batch, count + 1, dtype=torch.bool, device=idx.device)
    slots = idx if valid is None else torch.where(valid, idx, count)
    taken = taken.scatter(1, slots, True)[:, :count]
    if valid is None and present is None:
        # A stable sort of the flags puts the free positions first, in order, at a static size.
        order = taken.to(torch.uint8).sort(dim=1, stable=True).indices
        return order[:, : count - idx.shape[1]], None
    free = ~taken if present is None else ~taken & present
    counts = free.sum(1)
    order = (~free).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(counts.max())]
    return order, torch.arange(order.shape[1], device=idx.device) < counts[:, None]
