"""DenseBackbone: maps of several strides from a vision transformer, reduced or not.

A dense backbone looks at the tokens of a driven ViT between its blocks, and may write to them; the
ViT and its method do not know about it. A patch that a block skips keeps its value
(``gone="last"``).
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from PIL import Image
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.v2.functional import pil_to_tensor

from foveate.backbones import backbone_for
from foveate.core import (
    Outcome,
    Recorder,
    ReducedViT,
    Reducer,
    TokenState,
    Trace,
    Windows,
    check_choice,
    dense,
)
from foveate.core.driver import Watch
from foveate.dense.canvas import Canvas

__all__ = ["DenseBackbone", "DenseModel", "Features", "Hosting", "drive", "windowed"]

GONE = ("last", "zero")
Images: TypeAlias = Tensor | ImageList | Sequence[Tensor]
_Self = TypeVar("_Self", bound="Hosting")


@dataclass(eq=False)
class Features:
    """The result of one pass through a dense backbone.

    Attributes:
        maps: maps by name, the finest first: ``[B, C, h, w]``.
        canvas: the padded images, and which cells of the maps are real.
        state: the tokens after the last block, with the notes of the method.
    """

    maps: OrderedDict[str, Tensor]
    canvas: Canvas
    state: TokenState

    @property
    def outcome(self) -> Outcome:
        """The pass in the form that a method's losses read; it has no logits."""
        return Outcome(self.state.x.new_zeros(self.state.batch, 0), self.state)


class Hosting(nn.Module):
    """A model around a ViT that a method can be applied to.

    Attributes:
        inner: name of the submodule that holds the ViT; a subclass sets it.
        uncounted: the part that ``fixed`` leaves out, in words.
    """

    inner: str
    uncounted: ClassVar[str] = ""

    @property
    def reduced(self) -> ReducedViT:
        """The driven ViT inside."""
        inside = getattr(self, self.inner)
        return inside if isinstance(inside, ReducedViT) else inside.reduced

    @property
    def reducer(self) -> Reducer:
        """The method of the ViT inside."""
        return self.reduced.reducer

    @property
    def trunk(self) -> DenseBackbone:
        """The dense backbone inside, or this model if it is one."""
        inside = getattr(self, self.inner)
        return self if isinstance(self, DenseBackbone) else inside.trunk

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that the model is made for."""
        spec = self.reduced.backbone.spec
        return spec.grid[0] * spec.patch[0], spec.grid[1] * spec.patch[1]

    def prepared(self, images: Images) -> Images:
        """Return images as the dense backbone takes them."""
        return images

    def fixed(self, images: Images) -> Features:
        """Run the part whose cost does not depend on what images show; ``foveate.count`` counts it.

        Args:
            images: the result of ``prepared``.
        """
        raise NotImplementedError

    def with_method(self: _Self, drive: Callable[[nn.Module], ReducedViT]) -> _Self:
        """Return this model with its ViT driven by ``drive``; all weights are shared.

        ``foveate.apply`` and ``foveate.unwrap`` call it.
        """
        inside = getattr(self, self.inner)
        if isinstance(inside, ReducedViT):
            _check_free(inside)
            changed: nn.Module = drive(inside.vit)
        else:
            changed = inside.with_method(drive)
        new = copy.copy(self)
        new._modules = dict(self._modules)
        setattr(new, self.inner, changed)
        return new

    def method_losses(self, outcome: Outcome, classes: Tensor | None = None) -> dict[str, Tensor]:
        """Return the method's own weighted losses; each is named ``loss_NAME``.

        Args:
            outcome: the result of the pass.
            classes: classes of all patches, ``[B, H, W]``, -100 for a patch without a class; None
                unless the method learns from them.
        """
        own = self.reducer.weighted_losses(outcome, classes)
        return {f"loss_{name}": value for name, value in own.items()}

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that are exempt from weight decay besides norms and biases."""
        names = getattr(self, self.inner).no_weight_decay()
        return {f"{self.inner}.{name}" for name in names}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return trainable parameters: the method's ("new"), "backbone", and the rest ("head")."""
        groups = self.reduced.parameter_groups()
        known = {id(p) for group in groups.values() for p in group}
        head = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return {**groups, "head": head}


class DenseModel(Hosting):
    """Base class of detectors and segmenters.

    Attributes:
        transform: normalises, resizes and pads images; see ``Preparation``.
        num_classes: number of classes.
        class_names: names of the classes; empty if none were given.
        settings: the arguments of ``make_dense``, from which the model can be built again; empty
            for a model that was built another way.
    """

    inner = "backbone"
    transform: Any
    num_classes: int
    class_names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def display_names(self) -> tuple[str, ...]:
        """Names of the classes to show; "class N" if none were given."""
        return self.class_names or tuple(f"class {n}" for n in range(self.num_classes))

    @property
    def pixel_classes(self) -> int:
        """Number of classes that a pixel may have."""
        return self.num_classes

    def with_method(self: _Self, drive: Callable[[nn.Module], ReducedViT]) -> _Self:
        new: Any = super().with_method(drive)
        new.reducer.for_pixels(new.pixel_classes)
        return new

    @property
    def input_size(self) -> tuple[int, int]:
        return self.transform.image_size or super().input_size

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert an image to the model's input: ``[channels, h, w]`` with values from 0 to 1."""
        like, channels = next(self.parameters()), self.reduced.backbone.channels
        values = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
        return values.to(like.device).to(like.dtype) / 255

    def prepared(self, images: Images) -> ImageList:
        return self.transform(list(images))[0]

    @torch.no_grad()
    def trace(self, images: Sequence[Tensor]) -> Trace:
        """Run the backbone once and record every block's tokens."""
        return self.trunk.trace(self.prepared(images))


class DenseBackbone(Hosting):
    """Base class of the backbones that return maps.

    Attributes:
        body: the driven ViT.
        scales: cells per patch of each map, the finest first.
        out_channels: channels of every map.
        size_divisible: number of pixels; the sides of images are padded to a multiple of it.
        feature_info: channels and reduction of each map, in the form of timm's feature extractors.
        gone: value of a patch whose token is gone: its "last" value, or "zero".
    """

    inner = "body"

    def __init__(
        self, vit: nn.Module, *, scales: Sequence[float], out_channels: int | None, gone: str
    ) -> None:
        super().__init__()
        check_choice("gone", gone, GONE)
        self.body = drive(vit)
        spec = self.body.backbone.spec
        self.scales, self.gone = tuple(float(scale) for scale in scales), gone
        self.out_channels = spec.width if out_channels is None else out_channels
        self.multiple = round(max(1.0, 1 / min(self.scales)))
        self.size_divisible = self.multiple * math.lcm(*spec.patch)
        info: list[dict[str, Any]] = [
            {
                "num_chs": self.out_channels,
                "reduction": _plain(max(spec.patch) / scale),
                "module": str(number),
            }
            for number, scale in enumerate(self.scales)
        ]
        self.feature_info = FeatureInfo(info, tuple(range(len(info))))

    def forward(self, images: Images) -> OrderedDict[str, Tensor]:
        """Return maps of images, the finest first, named "0", "1", ...

        Maps cover the images padded to ``size_divisible``, and are zero in the padding.

        Args:
            images: preprocessed images: a batch ``[B, channels, H, W]``, torchvision's
                ``ImageList``, or a list of images ``[channels, h, w]`` of different sizes.
        """
        return self.features(images).maps

    def run(self, images: Images) -> tuple[OrderedDict[str, Tensor], Outcome]:
        """Return the maps, and the outcome from which the method computes its losses."""
        found = self.features(images)
        return found.maps, found.outcome

    def features(self, images: Images, watch: Watch | None = None) -> Features:
        """Return maps, canvas and tokens; ``watch`` is called with the tokens of every block."""
        patch = self.body.backbone.spec.patch
        canvas = Canvas.of(images, patch, self.multiple)
        maps, state = self.maps(canvas, watch)
        named = OrderedDict((str(n), values) for n, values in enumerate(maps))
        return Features(named, canvas, state)

    def fixed(self, images: Images) -> Features:
        return self.features(images)

    def maps(self, canvas: Canvas, watch: Watch | None) -> tuple[list[Tensor], TokenState]:
        """Compute the maps, the finest first, and return the tokens after the last block."""
        raise NotImplementedError

    def blocks(self, state: TokenState, first: int, last: int, watch: Watch | None) -> TokenState:
        """Run the ViT's blocks from ``first`` up to, not including, ``last`` on the tokens."""
        for block in range(first, last):
            state = self.body.step(block, state, watch)
        return state

    @torch.no_grad()
    def trace(self, images: Images) -> Trace:
        """Run once and record every block's tokens, including what this backbone adds to them."""
        records = Recorder()
        found = self.features(images, records.watch)
        state = found.state.recalled()
        return Trace(found.outcome.logits, state.grid, records.blocks, state)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the ViT exempts from weight decay."""
        listed = getattr(self.body.vit, "no_weight_decay", None)
        return {f"body.vit.{name}" for name in listed()} if listed is not None else set()


def drive(vit: nn.Module) -> ReducedViT:
    """Return a ViT from ``foveate.apply`` as it is, and a plain one in the dense driver."""
    return vit if isinstance(vit, ReducedViT) else dense(backbone_for(vit))


def windowed(vit: nn.Module, *, size: int = 14, every: int = 3) -> ReducedViT:
    """Drive a dense ViT with attention inside windows, except in a few global blocks.

    Args:
        vit: a plain ViT.
        size: side of a window in patches.
        every: distance between global blocks: 3 makes blocks 2, 5, 8 and 11 global.
    """
    if isinstance(vit, ReducedViT):
        raise ValueError(
            f"a ViT reduced by {vit.reducer.name} cannot run in windows: the tokens that are left "
            "do not fill them; give the plain ViT"
        )
    return dense(backbone_for(vit), Windows(size, every))


def _check_free(inside: ReducedViT) -> None:
    if inside.windows is not None:
        raise ValueError(
            "a ViT in windows cannot be reduced: the tokens that are left would not fill them; "
            "build the dense model on the plain ViT"
        )


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
