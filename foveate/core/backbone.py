"""What the core asks of a model family: parts, not a forward pass.

A family file in ``foveate.backbones`` subclasses Backbone. It is the only place that knows a
model class; the softmax, the tokens and the order of things are the core's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.attention import Heads
from foveate.core.tokens import TokenState

__all__ = ["Backbone", "BackboneSpec", "Embedded", "pool_mask", "pool_tokens"]


@dataclass(frozen=True)
class BackboneSpec:
    """Facts about a backbone that methods may build on.

    Attributes:
        family: name of the family, as errors and ``describe`` print it.
        width, depth, heads: token width, number of blocks, attention heads.
        prefix: tokens in front of the patches.
        class_token: whether the first prefix token is a class token.
        patch: patch height and width in pixels.
        grid: patch rows and columns at the model's own input size.
        classes: outputs of the head; 0 for a headless model.
        rotary: positions enter through rotary embeddings, so tokens must carry their place.
        pools_patches: the head reads patch tokens, not only prefix tokens.
        qkv_cost, mlp_cost: multiply-adds per token of a block's linear layers, per block.
        embed_cost: multiply-adds per patch of the embedding.
        head_cost: multiply-adds of the head per image.
        pool_cost: multiply-adds of the head per patch token that is left at the end.
        thin_key_mean: head-averaged keys cost a product of their own (``Backbone.key_mean``).
    """

    family: str
    width: int
    depth: int
    heads: int
    head_dim: int
    prefix: int
    class_token: bool
    patch: tuple[int, int]
    grid: tuple[int, int]
    classes: int
    rotary: bool
    pools_patches: bool
    qkv_cost: tuple[int, ...]
    mlp_cost: tuple[int, ...]
    embed_cost: int
    head_cost: int
    pool_cost: int = 0
    thin_key_mean: bool = False


@dataclass(eq=False)
class Embedded:
    """Embedded images: tokens ``[B, N, C]``, their grid, and a rotary table or None.

    The table is ``[H*W + 1, 1, 2d]`` or, one a block, ``[depth, H*W + 1, heads, 2d]``; its last
    row turns nothing and serves tokens without a place.
    """

    x: Tensor
    grid: tuple[int, int]
    table: Tensor | None = None


class Backbone:
    """The parts of one model. Holds the model, adds nothing to it.

    ``family`` is the name that errors, ``describe`` and saved folders use.

    ``driver`` is the class that runs models of the family where ReducedViT's own interface (images
    in, logits out) is not theirs.

    ``needs_every_token`` says why no token of the family's models may be left out, if that is so.
    No method runs on such a family, and ``whole`` takes the place of ``qkv``, ``project`` and
    ``feedforward``.
    """

    family: ClassVar[str] = ""
    driver: ClassVar[Any] = None  # a kind of ReducedViT, which is built on this file
    needs_every_token: ClassVar[str] = ""

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        self.spec = spec
        self.bind(model)

    def bind(self, model: nn.Module) -> None:
        """Take the parts from this model: the one given, or a replica of it."""
        # Any: what a family reads off its model is known to the family file alone.
        self.model: Any = model

    def undrivable(self) -> ValueError:
        """The error for a method on a family that needs every token."""
        return ValueError(
            f"{self.family} models cannot run with fewer tokens: {self.needs_every_token}; dense "
            "pre-training and fine-tuning work"
        )

    def current(self) -> bool:
        """Whether the model still is what ``spec`` and the parts were read from."""
        return True

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Whether the model is of this family at all, drivable or not."""
        raise NotImplementedError

    # The model as it is ------------------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model's own blocks, in order."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Channels of an input image."""
        raise NotImplementedError

    def native(self, images: Tensor) -> Tensor:
        """The model's own answer to these images, of which ``head`` gives the reduced one."""
        return self.model(images)

    def recipe(self) -> dict[str, Any] | None:
        """Plain data from which ``rebuild`` makes the model again, without its weights.

        None where the model is not one that can be made again.
        """
        return None

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any]) -> nn.Module:
        """Make a model from what ``recipe`` gave; ValueError saying what does not fit."""
        raise NotImplementedError

    # The model in parts ------------------------------------------------------------------------

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patch rows and columns of these images; ValueError when the patch does not fit."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Embedded:
        """Everything before the first block."""
        raise NotImplementedError

    def whole(self, images: Tensor) -> TokenState:
        """Final, normed tokens by the model's own blocks, where the family needs every token."""
        raise NotImplementedError

    def qkv(self, block: int, x: Tensor, rotary: Tensor | None) -> Heads:
        """First norm and the query, key and value projections, for tokens ``[T, C]``."""
        raise NotImplementedError

    def project(self, block: int, out: Tensor, heads: Heads) -> Tensor:
        """From attention output to what is added to the residual stream (before DropPath)."""
        raise NotImplementedError

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Second norm and MLP: what is added to the residual stream (before DropPath)."""
        raise NotImplementedError

    def drop_path(self, block: int, branch: int) -> nn.Module | None:
        """The stochastic depth module of a branch (0 attention, 1 feed forward), or None."""
        raise NotImplementedError

    def norm(self, x: Tensor) -> Tensor:
        """The final norm over tokens."""
        raise NotImplementedError

    def head(self, state: TokenState) -> Tensor:
        """Pooling and head, from normed tokens."""
        raise NotImplementedError

    def key_mean(self, block: int, heads: Heads) -> Tensor | None:
        """Keys averaged over heads ``[T, d]`` by a cheaper way than their mean, or None."""
        return None

    @property
    def checkpointing(self) -> bool:
        """Whether the model asks for gradient checkpointing."""
        return bool(getattr(self.model, "grad_checkpointing", False))

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Image size the model insists on, or None when it takes any."""
        return None


def pool_tokens(state: TokenState, how: str, include_prefix: bool = False) -> Tensor:
    """Pool ``state`` per image, ``[B, C]``, whatever its layout.

    Merged tokens weigh as many patches as they stand for; dead, fused and padding tokens do not
    count. ``how`` is "avg", "max" or "avgmax".
    """
    skip = 0 if include_prefix else state.prefix
    x = state.tokens()[:, skip:]
    weight = _pool_weight(state)
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], x.shape[2])
    if weight is None:
        mean, best = x.mean(1), x.amax(1) if how != "avg" else None
    else:
        weight = weight[:, skip:]
        total = weight.sum(1, keepdim=True)
        # An image with nothing to pool gives zeros, not NaN.
        share = weight / torch.where(total > 0, total, torch.ones_like(total))
        mean = (share.to(x.dtype)[..., None] * x).sum(1)
        best = None
        if how != "avg":
            best = x.masked_fill((weight <= 0)[..., None], float("-inf")).amax(1)
            best = torch.where(total > 0, best, torch.zeros_like(best))
    if how == "avg":
        return mean
    assert best is not None
    return best if how == "max" else 0.5 * (mean + best)


def pool_mask(state: TokenState) -> Tensor | None:
    """Tokens that attention pooling may read, ``[B, 1, 1, N]`` bool; None means all."""
    weight = _pool_weight(state, sizes=False)
    return None if weight is None else (weight > 0)[:, None, None, :]


def _pool_weight(state: TokenState, sizes: bool = True) -> Tensor | None:
    """Weight of every token, ``[B, N]`` float32; None when all are equal."""
    weight: Tensor | None = None
    if sizes and state.size is not None:
        weight = state.layout.rect(state.size)
    if state.place is not None and state.prefix * state.batch < state.layout.total:
        real = state.layout.rect(state.placed().float())
        front = torch.arange(real.shape[1], device=real.device) < state.prefix
        real = torch.where(front, torch.ones_like(real), real)
        weight = real if weight is None else weight * real
    if state.alive is not None:
        weight = state.alive.float() if weight is None else weight * state.alive
    valid = state.layout.valid(state.x.device)
    if valid is not None:
        weight = valid.float() if weight is None else weight * valid
    return weight
