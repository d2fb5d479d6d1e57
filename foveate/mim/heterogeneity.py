"""Measure how hidden tokens relate to visible ones: affinities, their entropy, signs of collapse.

Heterogeneity (MTO, equation 2) is the entropy of a hidden token's softmax over its similarities to
the visible tokens: high if it resembles all of them equally, low if it resembles a few. The numbers
depend on the similarity: with raw dot products they fall with depth even in an untrained network,
because norms grow.

All is computed in float32, also under autocast, where residual streams have that precision anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.schedule import check_choice
from foveate.mim.masks import Mask
from foveate.mim.targets import gathered

__all__ = ["SIMILARITIES", "Similarity", "entropy", "heterogeneity", "visible_cosine"]

SIMILARITIES = ("cosine", "layernorm", "scaled", "raw")
_TINY = 1e-6


@dataclass(frozen=True)
class Similarity:
    """A measure of how similar two tokens are.

    Attributes:
        kind: "cosine" over ``temperature``; "layernorm": dot product of normalised tokens over the
            root of the width; "scaled": dot product over that root; "raw": dot product, as printed
            in the paper.
        temperature: number that divides cosines.
    """

    kind: str = "cosine"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_choice("similarity", self.kind, SIMILARITIES)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Compare ``[B, R, C]`` with ``[B, K, C]``; the result is ``[B, R, K]`` float32."""
        width = rows.shape[-1]
        if self.kind == "layernorm":
            rows, columns = (F.layer_norm(x, (width,)) for x in (rows, columns))
        # Products of half precision would be rounded to it, and may overflow before they are
        # divided by norms; under autocast only tokens that no block has changed yet have it.
        dots = torch.matmul(rows.float(), columns.float().mT)
        if self.kind == "raw":
            return dots
        if self.kind != "cosine":
            return dots / math.sqrt(width)
        # Dividing products by norms keeps no normalised copies of the tokens.
        norms = [_norms(x).clamp_min(_TINY) for x in (rows, columns)]
        return dots / norms[0][:, :, None] / norms[1][:, None, :] / self.temperature


def heterogeneity(
    tokens: Tensor,
    mask: Mask,
    similarity: Similarity,
    *,
    normalise: bool = True,
    alike: bool = False,
    detach_visible: bool = False,
) -> Tensor:
    """Return the entropy of hidden tokens over visible ones, a mean for each image, ``[B]``.

    Args:
        tokens: ``[B, N, C]`` in raster order.
        mask: what is hidden.
        similarity: of tokens.
        normalise: divide by the logarithm of the number of visible tokens, to lie in [0, 1].
        alike: all hidden tokens of an image are the same, so one of them is enough.
        detach_visible: let no gradient reach visible tokens.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        if mask.visible is None or mask.masked is None:
            return _ragged(tokens, mask, similarity, normalise, detach_visible)
        masked = mask.masked[:, :1] if alike else mask.masked
        both = gathered(tokens, torch.cat([masked, mask.visible], 1))
        rows, columns = both.split([masked.shape[1], mask.visible.shape[1]], 1)
        logits = similarity(rows, columns.detach() if detach_visible else columns)
        found = entropy(logits, holes=False).mean(1)
        return _of_most(found, mask.visible.shape[1]) if normalise else found


def _ragged(
    tokens: Tensor, mask: Mask, similarity: Similarity, normalise: bool, detach_visible: bool
) -> Tensor:
    """Compute all rows and columns, for images with different numbers of hidden patches."""
    hidden = mask.hidden
    logits = similarity(tokens, tokens.detach() if detach_visible else tokens)
    each = entropy(logits.masked_fill(hidden[:, None, :], float("-inf")))
    count = hidden.sum(1)
    found = (each * hidden).sum(1) / count.clamp_min(1)
    if not normalise:
        return found
    most = (hidden.shape[1] - count).clamp_min(2).float().log()
    return torch.where(hidden.shape[1] - count > 1, found / most, torch.zeros_like(found))


def entropy(logits: Tensor, *, holes: bool = True) -> Tensor:
    """Return the entropy of a softmax in nats; with ``holes`` -inf leaves a place out.

    The logarithm of a sum minus a mean never takes the logarithm of a probability.
    """
    if not holes:
        return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    out = logits.isneginf()
    nowhere = out.all(-1, keepdim=True)  # no place at all: no softmax, and nothing to say
    zero = torch.zeros_like(logits)
    safe = torch.where(nowhere, zero, logits)
    found = safe.logsumexp(-1) - (safe.softmax(-1) * torch.where(out, zero, logits)).sum(-1)
    return torch.where(nowhere[..., 0], torch.zeros_like(found), found)


def visible_cosine(tokens: Tensor, mask: Mask) -> Tensor:
    """Return the mean cosine between an image's visible tokens, ``[B]``; 1 means collapsed."""
    shown = (~mask.hidden)[..., None]
    unit = F.normalize(tokens.detach().float(), dim=-1) * shown
    count = shown.sum((1, 2)).float()
    pairs = unit.sum(1).square().sum(-1) - count  # without those of a token with itself
    return pairs / (count * (count - 1)).clamp_min(1)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _of_most(found: Tensor, visible: int) -> Tensor:
    return found / math.log(visible) if visible > 1 else torch.zeros_like(found)
