"""Measure how hidden tokens relate to visible ones: affinities, their entropy, signs of collapse.

Heterogeneity (MTO, equation 2) is the entropy of a hidden token's softmax over its similarities to
the visible tokens: high if it resembles all of them equally, low if it resembles a few. The numbers
depend on the similarity: with raw dot products they fall with depth even in an untrained network,
because norms grow.

All is computed in float32, also under autocast, where residual streams have that precision anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foveate.core.schedule import check_choice
from foveate.mim.masks import Mask

__all__ = ["SIMILARITIES", "Similarity", "entropy", "heterogeneity", "recomputed", "visible_cosine"]

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

    def __call__(
        self, *layers: Tensor, chosen: Tensor | None = None, detach_chosen: bool = False
    ) -> Tensor:
        """Compare all tokens of an image with the chosen ones of it, in float32.

        Args:
            layers: ``[B, N, C]`` each.
            chosen: places ``[B, K]`` without repeats; None chooses all tokens.
            detach_chosen: let no gradient reach tokens as chosen ones.

        Returns:
            ``[layers * B, N, K]``, one layer after another.
        """
        width, cosine = layers[0].shape[-1], self.kind == "cosine"
        scale = {"cosine": 1 / self.temperature, "raw": 1.0}.get(self.kind, width**-0.5)

        def products(*tokens: Tensor) -> Tensor:
            return _Products.apply(chosen, detach_chosen, scale, cosine, *tokens)

        if self.kind != "layernorm":
            return products(*layers)
        # Normalised copies are not kept.
        return recomputed(
            lambda *each: products(*(F.layer_norm(x.float(), (width,)) for x in each)), *layers
        )


class _Products(torch.autograd.Function):
    """Scaled products of all tokens with the chosen ones, or cosines.

    Autograd by itself would keep a copy of the chosen tokens and of the norms' inputs for every
    layer, and read and write all tokens several times more. This keeps the tokens, which the
    network keeps anyway, the result and the norms.
    """

    @staticmethod
    def forward(
        ctx: Any,
        chosen: Tensor | None,
        detach_chosen: bool,
        scale: float,
        cosine: bool,
        *layers: Tensor,
    ) -> Tensor:
        """Compute the products, all layers at once."""
        tokens = _together(layers)
        places = _places(chosen, tokens)
        # Products of half precision would be rounded to it, and may overflow before they are
        # divided by norms; under autocast only tokens that no block has changed yet have it.
        found = torch.bmm(tokens, tokens[places].mT).mul_(scale)
        norms = None
        if cosine:
            norms = torch.linalg.vector_norm(tokens, dim=-1).clamp_min_(_TINY)
            found.div_(norms[:, :, None]).div_(norms[places][:, None, :])
        ctx.save_for_backward(chosen, found if cosine else None, norms, *layers)
        ctx.detach_chosen, ctx.scale = detach_chosen, scale
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each layer."""
        chosen, found, norms, *layers = ctx.saved_tensors
        tokens = _together(layers)
        places = _places(chosen, tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            along = None
            if norms is not None:  # what norms pull along each token
                pull = grad * found
                along = pull.sum(2)
                if not ctx.detach_chosen:
                    along[places] += pull.sum(1)
                along = torch.where(norms > _TINY, along / norms.square(), 0)
                grad = grad / norms[:, :, None] / norms[places][:, None, :]
            grad = grad * ctx.scale
            out = torch.bmm(grad, tokens[places])
            if along is not None:
                out.addcmul_(tokens, along[:, :, None], value=-1)
            if not ctx.detach_chosen:
                out[places] += torch.bmm(grad.mT, tokens)
        parts = out.view(len(layers), -1, *out.shape[1:])
        return None, None, None, None, *(x.to(y.dtype) for x, y in zip(parts, layers, strict=True))


def _together(layers: Sequence[Tensor]) -> Tensor:
    """Return the layers one after another, without a copy of a single one."""
    return (layers[0] if len(layers) == 1 else torch.cat(list(layers))).float()


def _places(chosen: Tensor | None, tokens: Tensor) -> Any:
    """Return the index of the chosen tokens, in every layer the same ones."""
    if chosen is None:
        return ...
    chosen = chosen.repeat(len(tokens) // len(chosen), 1)
    return torch.arange(len(tokens), device=tokens.device)[:, None], chosen


def heterogeneity(
    layers: Tensor | Sequence[Tensor],
    mask: Mask,
    similarity: Similarity,
    *,
    normalise: bool = True,
    detach_visible: bool = False,
) -> Tensor:
    """Return the entropy of hidden tokens over visible ones, a mean for each image.

    Args:
        layers: tokens ``[B, N, C]`` in raster order, of one layer or of each of several.
        mask: what is hidden.
        similarity: of tokens.
        normalise: divide by the logarithm of the number of visible tokens, to lie in [0, 1].
        detach_visible: let no gradient reach visible tokens.

    Returns:
        ``[B]``, or ``[layers, B]``.
    """
    several = [layers] if isinstance(layers, Tensor) else list(layers)
    with torch.autocast(several[0].device.type, enabled=False):
        logits = similarity(*several, chosen=mask.visible, detach_chosen=detach_visible)

        many = mask.repeated(len(several))
        if many.visible is None or many.masked is None:
            found = recomputed(lambda x: _ragged(x, many.hidden, normalise), logits)
        else:
            found = entropy(logits, holes=False).gather(1, many.masked).mean(1)
            found = _of_most(found, many.visible.shape[1]) if normalise else found
    return found if isinstance(layers, Tensor) else found.view(len(several), -1)


def _ragged(logits: Tensor, hidden: Tensor, normalise: bool) -> Tensor:
    """Take the means over images with different numbers of hidden patches."""
    each = entropy(logits.masked_fill(hidden[:, None, :], float("-inf")))
    count = hidden.sum(1)
    found = (each * hidden).sum(1) / count.clamp_min(1)
    if not normalise:
        return found
    most = (hidden.shape[1] - count).clamp_min(2).float().log()
    return torch.where(hidden.shape[1] - count > 1, found / most, torch.zeros_like(found))


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute, and compute again in the backward pass instead of keeping activations."""
    if not (torch.is_grad_enabled() and any(one.requires_grad for one in inputs)):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def entropy(logits: Tensor, *, holes: bool = True) -> Tensor:
    """Return the entropy of a softmax in nats; with ``holes`` -inf leaves a place out.

    The logarithm of a sum minus a mean never takes the logarithm of a probability.
    """
    if not holes:
        return _Entropy.apply(logits)
    out = logits.isneginf()
    nowhere = out.all(-1, keepdim=True)  # no place at all: no softmax, and nothing to say
    zero = torch.zeros_like(logits)
    safe = torch.where(nowhere, zero, logits)
    found = safe.logsumexp(-1) - (safe.softmax(-1) * torch.where(out, zero, logits)).sum(-1)
    return torch.where(nowhere[..., 0], torch.zeros_like(found), found)


class _Entropy(torch.autograd.Function):
    """Entropy of a softmax that keeps its logits alone, and is not computed again as a whole."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        """Compute it."""
        ctx.save_for_backward(logits)
        return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return a share times how far its logit lies below the mean one."""
        (logits,) = ctx.saved_tensors
        share = logits.softmax(-1)
        mean = (share * logits).sum(-1, keepdim=True)
        return (mean - logits).mul_(share).mul_(grad[..., None])


def visible_cosine(tokens: Tensor, mask: Mask) -> Tensor:
    """Return the mean cosine between an image's visible tokens, ``[B]``; 1 means collapsed."""
    shown = (~mask.hidden)[..., None]
    unit = F.normalize(tokens.detach().float(), dim=-1) * shown
    count = shown.sum((1, 2)).float()
    pairs = unit.sum(1).square().sum(-1) - count  # without those of a token with itself
    return pairs / (count * (count - 1)).clamp_min(1)


def _of_most(found: Tensor, visible: int) -> Tensor:
    return found / math.log(visible) if visible > 1 else torch.zeros_like(found)
