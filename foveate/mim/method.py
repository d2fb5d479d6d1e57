"""The base of every method of masked image modelling: a ViT, its additions, and its interface.

A method is one file: a subclass that is registered by name. Options are the keyword arguments of
its constructor.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

from torch import Tensor, nn

from foveate.backbones import TimmBeit, TimmViT, backbone_for
from foveate.core.options import check_type
from foveate.mim.masks import Hiding, Mask
from foveate.mim.targets import unpatchify
from foveate.registry import suggest
from foveate.train.draws import Draws

__all__ = [
    *("METHODS", "MaskedImageModel", "Prediction", "States", "fixed_mask", "make_method"),
    "register",
]

METHODS: dict[str, type[MaskedImageModel]] = {}
_M = TypeVar("_M", bound="type[MaskedImageModel]")
_FIXED = 2**31  # steps that no run reaches: masks of evaluation are drawn as of these


@dataclass(eq=False)
class States:
    """Patch tokens of one network, layer by layer, hidden and visible ones together.

    Attributes:
        tokens: ``[B, N, C]`` before the first block and after every block, in raster order, without
            prefix tokens: a residual stream, before any final norm.
        initial: as the first of them, before positions were added; hidden rows are all the same.
    """

    tokens: Sequence[Tensor]
    initial: Tensor


@dataclass(eq=False)
class Prediction:
    """The prediction of a method for a batch.

    Attributes:
        losses: losses by name, means over what they compare.
        patches: the prediction for every patch, ``[B, N, values]``, in units of the target.
        mask: the hidden patches.
        states: tokens of each network that has hidden and visible tokens; empty if not asked for.
    """

    losses: dict[str, Tensor]
    patches: Tensor
    mask: Mask
    states: tuple[States, ...] = ()


class MaskedImageModel(nn.Module):
    """Base of the methods.

    Attributes:
        name: name in recipes.
        paper: reference to the paper.
        hiding: how the paper hides patches.
        fewest_hidden: patches that must be hidden in an image for there to be a loss.
        vit: the model that is pre-trained, and the only part that is kept at the end.
        options: what ``make_method`` made it with, defaults included, to make it again; None if it
            was constructed in another way.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    hiding: ClassVar[Hiding] = Hiding(kind="random", ratio=0.75)
    fewest_hidden: ClassVar[int] = 1

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.options: dict[str, Any] | None = None
        found = backbone_for(vit)
        if not isinstance(found, (TimmViT, TimmBeit)) or found.needs_whole_images:
            raise ValueError(
                f"{found.family} models cannot be pre-trained here: timm's VisionTransformer and "
                "Beit can"
            )
        self._backbone = found
        if getattr(vit, "attn_pool", None) is not None:
            raise ValueError(
                f"{type(vit).__name__} pools by attention, and there is no pooling here: make it "
                "with model.options.global_pool=''"
            )
        if isinstance(found.model.norm, nn.Identity):
            raise ValueError(
                f"{type(vit).__name__} norms after pooling, and there is no pooling here: make it "
                "with model.pool=token, or without a class token with global_pool=''"
            )

    @property
    def backbone(self) -> TimmViT | TimmBeit:
        """Return the parts of ``vit``, also in a copy of this module."""
        if self._backbone.model is not self.vit:
            self._backbone = type(self._backbone)(self.vit)
        return self._backbone

    @property
    def depth(self) -> int:
        """Return the number of blocks of the network in which hidden and visible tokens meet."""
        raise NotImplementedError

    @property
    def values(self) -> int:
        """Return the number of values of a patch: its pixels, in all channels."""
        rows, columns = self.backbone.spec.patch
        return rows * columns * self.backbone.channels

    def forward(self, images: Tensor, mask: Mask, *, states: bool = False) -> Prediction:
        """Predict the hidden patches of normalised images and compare.

        Args:
            images: ``[B, C, H, W]``.
            mask: for as many images and patches.
            states: collect the tokens of every layer.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the ViT wants left out of weight decay."""
        plain: Any = getattr(self.vit, "no_weight_decay", set)
        return {f"vit.{name}" for name in plain()}

    def initialise(self) -> None:
        """Draw the weights anew as the paper does."""
        raise NotImplementedError

    def painted(self, images: Tensor, prediction: Prediction) -> Tensor:
        """Return the prediction as normalised images ``[B, C, H, W]``, visible patches included."""
        backbone = self.backbone
        pixels = self.pixels(images, prediction.patches.float())
        if pixels.shape[-1] != self.values:
            raise ValueError(
                f"{self.name} predicts {pixels.shape[-1]} values a patch, which has {self.values}: "
                "it needs a method pixels() that says how a prediction looks"
            )
        return unpatchify(pixels, backbone.grid_of(images), backbone.spec.patch)

    def pixels(self, images: Tensor, patches: Tensor) -> Tensor:
        """Return predicted patches in units of the images."""
        return patches

    def _checked(self, images: Tensor, mask: Mask) -> tuple[int, int]:
        """Return the grid of the images, and refuse a mask that does not fit it."""
        grid, patch = self.backbone.grid_of(images), self.backbone.spec.patch
        size = tuple(images.shape[2:])
        if size != (grid[0] * patch[0], grid[1] * patch[1]):
            raise ValueError(
                f"images of {size[0]} x {size[1]} are not whole patches of {patch[0]} x "
                f"{patch[1]}: a ViT that pads them is not pre-trained here"
            )
        wanted = (len(images), grid[0] * grid[1])
        if tuple(mask.hidden.shape) != wanted:
            raise ValueError(
                f"the mask is of {list(mask.hidden.shape)} patches, the images have {list(wanted)}"
            )
        return grid


def register(name: str) -> Callable[[_M], _M]:
    """Register a method under its name in recipes."""

    def add(cls: _M) -> _M:
        if name in METHODS:
            raise ValueError(f"a method of pre-training named {name!r} is registered already")
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def make_method(
    name: str, vit: nn.Module, options: Mapping[str, Any] | None = None
) -> MaskedImageModel:
    """Make a method on a ViT, by its name and options."""
    if name not in METHODS:
        raise ValueError(suggest("method of pre-training", name, METHODS))
    cls = METHODS[name]
    legal = {key: one.default for key, one in inspect.signature(cls).parameters.items()}
    del legal["vit"]
    given, hints = dict(options or {}), get_type_hints(cls.__init__)
    for option, value in given.items():
        if option not in legal:
            raise ValueError(suggest(f"option of {name}", option, legal))
        check_type(option, value, hints[option])
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} must be finite, got {value}")
    made = cls(vit, **given)
    made.options = {**legal, **given}
    return made


def fixed_mask(
    model: MaskedImageModel, images: Tensor, masking: Hiding, seed: int = 0, index: int = 0
) -> Mask:
    """Draw masks for evaluation: always the same for the same batch, unlike in training."""
    backbone = model.backbone
    draws = Draws(seed, 0, _FIXED + index, device=images.device)
    return masking.draw(len(images), backbone.grid_of(images), backbone.spec.patch, draws)
