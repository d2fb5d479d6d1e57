"""Gates: turn two scores per token into a hard, differentiable decision.

How a gate decides is a switch of its own and does not depend on ``.training``:

* ``sample``: draw from the gate (Gumbel noise), as in training;
* ``argmax``: keep a token if keeping is at least as likely as dropping;
* ``topk``: keep exactly the k tokens with the best odds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core.selection import Selection

__all__ = ["DECISIONS", "decide", "shift_odds"]

DECISIONS = ("sample", "argmax", "topk")


def decide(
    logits: Tensor,
    how: str,
    *,
    k: int | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    gone: Tensor | None = None,
    at_least_one: bool = False,
) -> Tensor:
    """Return hard decisions ``[B, N]`` in {0, 1} whose gradient is that of the keep probability.

    Args:
        logits: ``[B, N, 2]``; index 0 is "keep".
        how: one of ``DECISIONS``.
        k: number of tokens to keep for "topk", one for all images or one per image.
        candidates: tokens that may be kept, ``[B, N]`` bool; None means all.
        gone: tokens that an earlier gate dropped, ``[B, N]`` bool. They get a decision like any
            other, because the earlier gate learns from it, but they do not count among the k.
        at_least_one: keep the likeliest candidate if an image would keep none.
    """
    logits = logits.float()
    if how == "sample":
        # -log(-log u) with u in the open interval; exponential_ never returns 0.
        noise = -torch.empty_like(logits).exponential_().log()
        logits = logits + noise
    keep = logits.softmax(-1)[..., 0]
    score = logits[..., 0] - logits[..., 1]
    if candidates is not None:
        score = score.masked_fill(~candidates, float("-inf"))
    eligible_score = score if gone is None else score.masked_fill(gone, float("-inf"))
    if how == "topk":
        assert k is not None
        best = Selection.best(eligible_score, k)
        picked = torch.ones_like(best.index, dtype=keep.dtype)
        if best.valid is not None:
            picked = best.valid.to(keep.dtype)
        hard = torch.zeros_like(keep).scatter(1, best.index, picked)
        if gone is not None:  # they are kept if their score would have been picked
            worst = eligible_score.masked_fill(hard == 0, float("inf")).amin(1, keepdim=True)
            hard = torch.where(gone, (score >= worst).to(hard.dtype), hard)
    else:
        hard = (score >= 0).to(keep.dtype)
        if at_least_one and score.shape[1] > 0:
            first = F.one_hot(eligible_score.argmax(1), score.shape[1]).to(hard.dtype)
            first = first * (eligible_score > float("-inf"))
            kept = hard if gone is None else hard * ~gone
            hard = torch.where(kept.sum(1, keepdim=True) > 0, hard, torch.maximum(hard, first))
    if not keep.requires_grad:
        return hard
    # Adding a difference that is exactly zero keeps the decision exactly 0 or 1.
    soft = keep if candidates is None else keep * candidates
    return hard + (soft - soft.detach())


@torch.no_grad()
def shift_odds(last: nn.Module, amount: float) -> None:
    """Add a number to the log-odds of a gate's last layer, whose first output is "keep"."""
    assert isinstance(last, nn.Linear) and last.bias is not None
    last.bias.add_(last.bias.new_tensor([amount / 2, -amount / 2]))
