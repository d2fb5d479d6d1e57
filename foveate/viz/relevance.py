"""Map where a base model looks: class attention, attention rollout, and relevance.

* attention: the class token's attention in one block, mean over heads;
* rollout: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020: the product
  over blocks of (A + I) / 2, A the mean over heads;
* relevance: Chefer et al., "Generic Attention-model Explainability for Interpreting Bi-Modal and
  Encoder-Decoder Transformers", ICCV 2021: R = I, then in every block R += A' R, A' the mean over
  heads of the positive part of A times the gradient of a class's logit with respect to A.

Each gives one number for each pair of tokens, and the class token's row is the map. Without a class
token, attention takes the mean over all rows. Rollout and relevance take the mean over the patches'
rows if there is no class token or the head reads patch tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.backbones import backbone_of
from foveate.core import Backbone, Heads, ReducedViT, TokenState, dense
from foveate.core.evaluation import evaluating
from foveate.core.schedule import check_choice

__all__ = ["HEATS", "heat_map"]

HEATS = ("attention", "rollout", "relevance")


def heat_map(
    model: nn.Module,
    images: Tensor,
    how: str = "relevance",
    *,
    block: int = -1,
    target: int | None = None,
) -> Tensor:
    """Compute how much each patch matters to a base model, ``[B, rows, columns]`` float32.

    Args:
        model: a plain ViT, or a model from ``foveate.apply``, whose base model is used.
        images: preprocessed images, ``[B, channels, H, W]``.
        how: "attention", "rollout" or "relevance".
        block: the block whose attention is shown, for "attention" only.
        target: the class that "relevance" explains; None is each image's prediction.
    """
    check_choice("how", how, HEATS)
    backbone = backbone_of(model)
    spec = backbone.spec
    if not -spec.depth <= block < spec.depth:
        raise ValueError(f"block must lie in {-spec.depth}..{spec.depth - 1}, got {block}")
    if how == "relevance" and not spec.classes:
        raise ValueError("relevance explains a class, and this model has no head: ask for rollout")
    with evaluating(backbone.model), torch.inference_mode(False):
        maps, state, logits = _maps(backbone, images.clone(), how == "relevance")
        if how == "attention":
            pairs, by_class = maps[block].mean(1), spec.class_token
        else:
            by_class = spec.class_token and not spec.pools_patches
            pairs = (
                _rollout(maps) if how == "rollout" else _relevance(maps, _chosen(logits, target))
            )
    pairs = pairs.detach()[:, :, spec.prefix :]
    row = pairs[:, 0] if by_class else pairs[:, _readers(backbone, how) :].mean(1)
    return row.unflatten(1, state.grid)


def _readers(backbone: Backbone, how: str) -> int:
    """Return the first row of the mean: the first token's for attention, else the first patch's."""
    return 0 if how == "attention" else backbone.spec.prefix


class _Mapped(ReducedViT):
    """Drives all tokens with un-fused attention and keeps all its maps ``[B, H, N, N]``."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, dense(backbone).reducer)
        self.maps: list[Tensor] = []

    def attend(self, block: int, heads: Heads, state: TokenState) -> Tensor:
        """Compute attention by two products and keep the softmax between them."""
        q, k, v = (
            t.view(state.batch, -1, *t.shape[1:]).transpose(1, 2)
            for t in (heads.q, heads.k, heads.v)
        )
        attention = (q @ k.transpose(-2, -1) * heads.scale).float().softmax(-1)
        self.maps.append(attention)
        return (attention.to(v.dtype) @ v).transpose(1, 2).flatten(0, 1).flatten(1)


def _maps(
    backbone: Backbone, images: Tensor, with_gradient: bool
) -> tuple[list[Tensor], TokenState, Tensor]:
    """Return the attention maps of all blocks, the final tokens and the model's logits."""
    if backbone.needs_every_token:
        raise backbone.undrivable()
    model = _Mapped(backbone)
    with torch.set_grad_enabled(with_gradient):
        state = model.begin(images)
        # From here on gradients are needed, whether or not the weights take any.
        state = state.with_tokens(state.x.detach().requires_grad_(with_gradient))
        for block in range(backbone.spec.depth):
            state = model.step(block, state)
        state = model.end(state)
        logits = backbone.head(state)
    return model.maps, state, logits


def _chosen(logits: Tensor, target: int | None) -> Tensor:
    """Return the logit to explain, summed over images, whose gradients are independent."""
    if logits.ndim != 2:
        raise ValueError("relevance explains a class, and this model returns un-pooled tokens")
    if target is None:
        return logits.amax(1).sum()
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target must lie in 0..{logits.shape[1] - 1}, got {target}")
    return logits[:, target].sum()


def _rollout(maps: list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for attention in maps:
        step = attention.mean(1)
        step = 0.5 * (step + torch.eye(step.shape[-1], device=step.device))
        total = step if total is None else step @ total
    assert total is not None
    return total


def _relevance(maps: list[Tensor], logit: Tensor) -> Tensor:
    """Compute R without its identity, which makes every patch equally relevant to itself."""
    gradients = torch.autograd.grad(logit, maps)
    batch, _, count, _ = maps[0].shape
    identity = torch.eye(count, device=logit.device).expand(batch, -1, -1)
    total = identity
    for attention, gradient in zip(maps, gradients, strict=True):
        total = total + (gradient * attention.detach()).clamp_min(0).mean(1) @ total
    return total - identity
