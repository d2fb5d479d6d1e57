"""Deterministic inverse-transform sampling of tokens from their scores."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_transform", "nearest"]


def inverse_transform(score: Tensor, points: Tensor, alive: Tensor | None = None) -> Tensor:
    """Mark the tokens that a grid of quantiles hits, ``[B, N]`` bool.

    ``score [B, N]`` is non-negative. Its running sum, scaled to end at 1, is the distribution.
    Each of ``points [K]`` in (0, 1] takes the token whose cumulative value is nearest; tokens hit
    more than once count once. ``alive [B, N]`` excludes padding and dead tokens.

    The running sum is taken in float64: with float32, neighbours of a flat distribution tie.
    """
    weight = score.to(_wide(score.device))
    even = torch.ones_like(weight) if alive is None else alive.to(weight.dtype)
    weight = weight * even
    # If all scores of an image are zero, its live tokens get equal weights.
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, even)
    cdf = weight.cumsum(1)
    cdf = cdf / cdf[:, -1:].clamp_min(torch.finfo(cdf.dtype).tiny)
    return nearest(cdf, points.expand(score.shape[0], -1), alive)


def nearest(cdf: Tensor, points: Tensor, alive: Tensor | None = None) -> Tensor:
    """Mark, for each of ``points [B, K]``, the token of the nearest value of ``cdf [B, N]``."""
    batch, count = cdf.shape
    grid = points.to(cdf.dtype).contiguous()
    right = torch.searchsorted(cdf, grid).clamp_max(count - 1)
    left = (right - 1).clamp_min(0)
    to_left = (grid - cdf.gather(1, left)).abs()
    to_right = (cdf.gather(1, right) - grid).abs()
    # Of two tokens at the same distance, take the later one. With equal scores and as many points
    # as tokens, every point lies halfway between two tokens; this rule then hits every token once,
    # and rounding must not change that.
    slack = 1e-9 if cdf.dtype == torch.float64 else 1e-6
    nearer_left = to_left < to_right - slack
    hit = torch.where(nearer_left, left, right)
    if alive is not None:
        # Dead tokens repeat the value before them: send a hit on one to the last live token
        # at or before it, or, where there is none, to the first live token.
        place = torch.arange(count, device=cdf.device).expand(batch, count)
        last = torch.where(alive, place, -1).cummax(1).values
        first = alive.to(torch.uint8).argmax(1, keepdim=True)
        hit = last.gather(1, hit)
        hit = torch.where(hit < 0, first, hit)
    marks = torch.zeros(batch, count, dtype=torch.bool, device=cdf.device)
    marks = marks.scatter(1, hit, True)
    return marks if alive is None else marks & alive


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
