"""Find similar pairs between two sets of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alternate_split", "best_partner", "pairwise", "unit"]


def alternate_split(count: int, first_is_source: bool) -> tuple[slice, slice]:
    """Split ``count`` positions alternately into sources and targets, as two slices."""
    start = 0 if first_is_source else 1
    return slice(start, count, 2), slice(1 - start, count, 2)


def unit(values: Tensor) -> Tensor:
    """Scale vectors ``[..., d]`` to length 1; zeros stay zeros."""
    return values / torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp_min(1e-12)


def pairwise(a: Tensor, b: Tensor, how: str) -> Tensor:
    """Return the similarity ``[B, Na, Nb]`` of ``a [B, Na, d]`` to ``b [B, Nb, d]``.

    ``how`` is "cosine", "l1" or "l2"; distances are negated, so that higher means more similar.
    """
    if how == "cosine":
        return unit(a) @ unit(b).transpose(1, 2)
    a, b = a.float(), b.float()
    return -torch.cdist(a, b, p=1.0 if how == "l1" else 2.0)


def best_partner(similarity: Tensor, target_valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each source's best value and target, ``[B, Na]``, of ``similarity [B, Na, Nb]``."""
    if target_valid is not None:
        similarity = similarity.masked_fill(~target_valid[:, None, :], float("-inf"))
    best = similarity.max(dim=-1)
    return best.values, best.indices
