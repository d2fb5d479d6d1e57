"""Backbone: the parts that the core needs from a model family, in place of a forward pass.

A family file in ``foveate.backbones`` subclasses Backbone. It is the only place that knows a
model class. The core owns the softmax, the tokens and the order of the steps.
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
        width, depth, heads: token width, number of blocks, number of attention heads.
        head_dim: width of an attention head.
        prefix: tokens in front of the patches.
        class_token: whether the first prefix token is a class token.
        patch: patch height and width in pixels.
        grid: patch rows and columns at the model's own input size.
        classes: outputs of the head; 0 for a headless model.
        rotary: whether positions enter through rotary embeddings, so that tokens must carry their
            place.
        pools_patches: whether the head reads patch tokens, not only prefix tokens.
        qkv_cost, mlp_cost: multiply-adds per token of the linear layers in the attention and in the
            MLP of each block.
        embed_cost: multiply-adds per patch of the embedding.
        embed_image_cost: multiply-adds of the embedding per image.
        embed_pair_cost: multiply-adds per pair of patches of the attention inside the embedding.
        early: number of blocks inside the embedding, which ``depth`` does not count.
        head_cost: multiply-adds of the head per image.
        pool_cost: multiply-adds of the head per patch token that is left at the end.
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
    embed_cost: float
    head_cost: int
    pool_cost: int = 0
    embed_image_cost: float = 0
    embed_pair_cost: float = 0
    early: int = 0


@dataclass(eq=False)
class Embedded:
    """Embedded images: tokens ``[B, N, C]``, their grid, and a rotary table or None.

    The rotary table is ``[H*W + 1, 1, 2d]`` or, with one table per block,
    ``[depth, H*W + 1, heads, 2d]``. Its last row rotates nothing, for tokens without a place.
    """

    x: Tensor
    grid: tuple[int, int]
    table: Tensor | None = None


class Backbone:
    """The parts of one model. A backbone holds the model and adds nothing to it.

    Attributes:
        family: the name that errors, ``describe`` and saved folders use.
        driver: class that drives models of the family, if their interface is not that of ReducedViT
            (images in, logits out).
        needs_every_token: reason why no token may be left out, or "". No method runs on such a
            family, and ``whole`` replaces the parts of a block.
        needs_whole_images: reason why no patch may be left out from the start, or "". Methods run
            on such a family, but keep masks do not.
    """

    family: ClassVar[str] = ""
    driver: ClassVar[Any] = None  # a subclass of ReducedViT, which imports this file
    needs_every_token: ClassVar[str] = ""
    needs_whole_images: ClassVar[str] = ""

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        self.spec = spec
        self.bind(model)

    def bind(self, model: nn.Module) -> None:
        """Take the parts from this model: the given one, or a replica of it."""
        # Any, because only the family file knows what it reads from its model.
        self.model: Any = model

    def undrivable(self) -> ValueError:
        """Make the error for a method on a family that needs every token."""
        return ValueError(
            f"{self.family} models cannot run with fewer tokens: {self.needs_every_token}; dense "
            "pre-training and fine-tuning work"
        )

    def check_takes_masks(self) -> None:
        """Refuse to leave patches out from the start where the family needs whole images."""
        if self.needs_whole_images:
            raise ValueError(f"{self.family} models take no keep_mask: {self.needs_whole_images}")

    def current(self) -> bool:
        """Tell whether the model is unchanged since ``spec`` and the parts were read from it."""
        return True

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Tell whether the model is of this family at all, drivable or not."""
        raise NotImplementedError

    # The model as it is ------------------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model's own blocks, in order."""
        raise NotImplementedError

    @property
    def early_blocks(self) -> Sequence[nn.Module]:
        """Blocks that ``embed`` runs, before those in ``blocks``."""
        return ()

    @property
    def classifies(self) -> bool:
        """Whether the model answers with one logit for each class."""
        return self.spec.classes > 0

    @property
    def channels(self) -> int:
        """Channels of an input image."""
        raise NotImplementedError

    def native(self, images: Tensor) -> Tensor:
        """Return the model's own answer to images, in the form that ``head`` returns."""
        return self.model(images)

    def recipe(self) -> dict[str, Any] | None:
        """Return plain data from which ``rebuild`` makes the model again, without its weights.

        Return None if the model cannot be made from plain data.
        """
        return None

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any]) -> nn.Module:
        """Make a model from what ``recipe`` returned; raise ValueError if it does not fit."""
        raise NotImplementedError

    # The model in parts ------------------------------------------------------------------------

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return patch rows and columns of images; raise ValueError if the patch does not fit."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Embedded:
        """Do everything before the first block."""
        raise NotImplementedError

    def whole(self, images: Tensor, depth: int | None = None) -> TokenState:
        """Run the model's own blocks on whole images and return normed tokens.

        Only families that need every token implement it.

        Args:
            images: preprocessed images.
            depth: number of blocks after which the tokens are taken; None is all of them.
        """
        raise NotImplementedError

    def attention_of(self, block: int) -> nn.Module:
        """Return the attention module of a block, which runs from ``qkv`` to ``project``."""
        raise NotImplementedError

    def wrap(self, out: Tensor) -> Any:
        """Put an attention output into the form that the model's own module returns."""
        return out

    def attention_input(self, block: int, x: Tensor) -> Tensor:
        """Apply the first norm, to tokens ``[T, C]``, or ``[B, N, C]`` by image."""
        raise NotImplementedError

    def qkv(self, block: int, y: Tensor, rotary: Tensor | None) -> Heads:
        """Make queries, keys and values of normed tokens, ``[T, H, d]`` each."""
        raise NotImplementedError

    def project(self, block: int, out: Tensor, y: Tensor) -> Tensor:
        """Turn the attention output into the attention module's own, from its input ``y``."""
        raise NotImplementedError

    def scale(self, block: int, out: Tensor) -> Tensor:
        """Apply what lies between the attention module and the residual sum, except DropPath."""
        return out

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Apply second norm and MLP; return what the residual sum adds, before DropPath."""
        raise NotImplementedError

    def drop_path(self, block: int, branch: int) -> nn.Module | None:
        """Return the stochastic depth module of a branch (0 attention, 1 feed forward), or None."""
        raise NotImplementedError

    def norm(self, x: Tensor) -> Tensor:
        """Apply the final norm over tokens."""
        raise NotImplementedError

    def head(self, state: TokenState) -> Tensor:
        """Apply pooling and head to normed tokens."""
        raise NotImplementedError

    @property
    def checkpointing(self) -> bool:
        """Whether the model asks for gradient checkpointing."""
        return bool(getattr(self.model, "grad_checkpointing", False))


def pool_tokens(state: TokenState, how: str, include_prefix: bool = False) -> Tensor:
    """Pool the tokens of each image, ``[B, C]``, whatever the layout.

    The mean weighs a merged token by the number of its patches; dead, fused and padding tokens do
    not count. ``how`` is "avg", "max" or "avgmax".
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
    """Mark the tokens that attention pooling may read, ``[B, 1, 1, N]`` bool; None means all."""
    weight = _pool_weight(state, sizes=False)
    return None if weight is None else (weight > 0)[:, None, None, :]


def _pool_weight(state: TokenState, sizes: bool = True) -> Tensor | None:
    """Return the weight of every token, ``[B, N]`` float32; None when all are equal."""
    weight: Tensor | None = None
    if sizes and state.size is not None:
        weight = state.layout.rect(state.size)
    if state.place is not None and not _only_prefix(state):
        real = state.layout.rect(state.is_patch().float())
        front = torch.arange(real.shape[1], device=real.device) < state.prefix
        real = torch.where(front, torch.ones_like(real), real)
        weight = real if weight is None else weight * real
    if state.alive is not None:
        weight = state.alive.float() if weight is None else weight * state.alive
    valid = state.layout.valid(state.x.device)
    if valid is not None:
        weight = valid.float() if weight is None else weight * valid
    return weight


def _only_prefix(state: TokenState) -> bool:
    count = state.layout.count
    return (
        state.layout.total == state.prefix * state.batch if count is None else count == state.prefix
    )
