"""Ways to dispose of the tokens that a method does not keep; each works with any score."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from foveate.core.selection import Selection
from foveate.core.tokens import TokenState
from foveate.ops import best_partner, unit

__all__ = ["DISPOSALS", "WEIGHING", "drop", "fuse", "fused", "merge", "park", "weighted_sum"]

Similarity = Callable[[Selection, Selection], Tensor]


def drop(state: TokenState, kept: Selection, weight: Tensor) -> TokenState:
    """Drop the others."""
    return state.keep(kept)


def fuse(state: TokenState, kept: Selection, weight: Tensor) -> TokenState:
    """Append the weighted sum of the others as one token."""
    exists = None
    if kept.lengths is not None:  # images that drop nothing have nothing to fuse
        exists = kept.fewer_than(state.counts)
    return state.keep(kept).append(fused(state, kept, weight), exists)


def fused(state: TokenState, kept: Selection, weight: Tensor, mean: bool = False) -> Tensor:
    """Return the weighted sum of all tokens that are not kept, ``[B, C]``; weights are ``[B, N]``.

    ``mean`` divides by the sum of the weights.
    """
    if kept.lengths is None:
        weight = weight.scatter(1, kept.index, 0.0)
    else:
        spare = weight.shape[1]  # an extra cell takes the entries that do not count
        padded = torch.cat([weight, weight.new_zeros(weight.shape[0], 1)], 1)
        weight = padded.scatter(1, kept.slots(spare), 0.0)[:, :-1]
    return weighted_sum(state, weight, mean)


def weighted_sum(state: TokenState, weight: Tensor, mean: bool = False) -> Tensor:
    """Return the sum of each image's tokens after the prefix, ``[B, C]``, by ``weight [B, N]``.

    ``mean`` divides by the sum of the weights.
    """
    if mean:
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-12)
    tokens = state.after_prefix(state.x)
    return (weight.to(tokens.dtype)[:, None, :] @ tokens).squeeze(1)


def merge(
    state: TokenState, kept: Selection, weight: Tensor, similarity: Similarity | None = None
) -> TokenState:
    """Average each of the others into the kept token that it resembles most.

    Args:
        state: the tokens.
        kept: those that stay.
        weight: weight of every token in the average, ``[B, N]``.
        similarity: gives the similarity of merged tokens to kept ones, ``[B, R, K]``; None takes
            the cosine of the tokens.
    """
    merged = kept.complement(weight.shape[1], state.present())
    with torch.no_grad():
        if similarity is None:  # the length of a merged token does not change its best partner
            alike = tokens_of(state, merged) @ unit(tokens_of(state, kept)).transpose(1, 2)
        else:
            alike = similarity(merged, kept)
        _, into = best_partner(alike, kept.valid)
    return state.merge(kept, merged, into, weight, track_size=False)


def tokens_of(state: TokenState, selection: Selection) -> Tensor:
    """Return the selected tokens as ``[B, K, C]``; padding holds arbitrary tokens."""
    rows = state.layout.rows(Selection(selection.index + state.prefix))
    if not state.layout.is_even:
        rows = rows.clamp_max(len(state.x) - 1)
    return state.x.index_select(0, rows).view(*selection.index.shape, state.x.shape[1])


def park(state: TokenState, kept: Selection, weight: Tensor) -> TokenState:
    """Set the others aside; they come back after the block."""
    return state.park(kept)


DISPOSALS: Mapping[str, Callable[[TokenState, Selection, Tensor], TokenState]] = {
    "drop": drop,
    "fuse": fuse,
    "merge": merge,
    "park": park,
}
WEIGHING = ("fuse", "merge")  # the disposals that read the weights
