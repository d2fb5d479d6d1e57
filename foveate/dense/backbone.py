"""DenseBackbone: maps of several strides from a vision transformer, reduced or not.

A dense backbone looks at the tokens of a driven ViT between its blocks, and may write to them; the
ViT and its method know nothing of it. What a block skips keeps its value (``gone="last"``).
"""

from __future__ import annotations

import copy
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
    """What one pass of a dense backbone gives.

    Attributes:
        maps: maps by name, the finest first: ``[B, C, h, w]``.
        canvas: the images, and which cells of the maps are real.
        state: the tokens after the last block, with the method's notes.
    """

    maps: OrderedDict[str, Tensor]
    canvas: Canvas
    state: TokenState

    @property
    def outcome(self) -> Outcome:
        """The pass as methods read it for their losses; it has no logits."""
        return Outcome(self.state.x.new_zeros(self.state.batch, 0), self.state)


class Hosting(nn.Module):
    """A model around a ViT that a method can be applied to.

    Attributes:
        inner: name of the module that the ViT is in; a subclass sets it.
        uncounted: what ``fixed`` leaves out, in words.
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
        """The method that the ViT inside runs with."""
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
        """Run what costs the same whatever the images show, for ``foveate.count``.

        Args:
            images: as ``prepared`` returns them.
        """
        raise NotImplementedError

    def with_method(self: _Self, drive: Callable[[nn.Module], ReducedViT]) -> _Self:
        """Return this model with its ViT driven otherwise; all weights are shared.

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
        """Return the method's own losses, weighted, under the names that a total adds up.

        Args:
            outcome: what the pass gave.
            classes: of all patches, ``[B, H, W]``, -100 where there is none. None unless the
                method learns them.
        """
        own = self.reducer.weighted_losses(outcome, classes)
        return {f"loss_{name}": value for name, value in own.items()}

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that are exempt from weight decay besides norms and biases."""
        names = getattr(self, self.inner).no_weight_decay()
        return {f"{self.inner}.{name}" for name in names}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return trainable parameters: "new" of the method, "backbone", and the "head" around."""
        groups = self.reduced.parameter_groups()
        known = {id(p) for group in groups.values() for p in group}
        head = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return {**groups, "head": head}


class DenseModel(Hosting):
    """Base of detectors and segmenters.

    Attributes:
        transform: norms, resizes and pads images; see ``Preparation``.
        num_classes: number of classes.
        class_names: their names; empty where nobody gave them.
        settings: what ``make_dense`` made the model of, so that it can be made again; empty for a
            model that was put together by hand.
    """

    inner = "backbone"
    transform: Any
    num_classes: int
    class_names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})

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
        """Return an image as the model is called with it: ``[channels, h, w]`` from 0 to 1."""
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
    """Base of the backbones that give maps.

    Attributes:
        body: the driven ViT.
        scales: cells a patch of each map, the finest first.
        out_channels: channels of every map.
        size_divisible: images are padded to a multiple of so many pixels.
        feature_info: channels and reduction of each map, as timm's feature extractors have it.
        gone: what a patch whose token is gone shows: its "last" value, or "zero".
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
        self.size_divisible = self.multiple * max(spec.patch)
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
        """Return maps together with the pass's tokens and notes, for the method's losses."""
        found = self.features(images)
        return found.maps, found.outcome

    def features(self, images: Images, watch: Watch | None = None) -> Features:
        """Return maps, canvas and tokens; ``watch`` is shown the tokens in every block."""
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
        """Take the tokens through a few blocks of the ViT."""
        for block in range(first, last):
            state = self.body.step(block, state, watch)
        return state

    @torch.no_grad()
    def trace(self, images: Images) -> Trace:
        """Run once and record every block's tokens, as this backbone leaves them."""
        records = Recorder()
        found = self.features(images, records.watch)
        state = found.state.recalled()
        return Trace(found.outcome.logits, state.grid, records.blocks, state)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the ViT exempts from weight decay."""
        listed = getattr(self.body.vit, "no_weight_decay", None)
        return {f"body.vit.{name}" for name in listed()} if listed is not None else set()


def drive(vit: nn.Module) -> ReducedViT:
    """Return a ViT that is driven: one from ``foveate.apply`` as it is, a plain one dense."""
    return vit if isinstance(vit, ReducedViT) else dense(backbone_for(vit))


def windowed(vit: nn.Module, *, size: int = 14, every: int = 3) -> ReducedViT:
    """Drive a dense ViT with attention inside windows, but for a few global blocks.

    Args:
        vit: a plain ViT.
        size: side of a window in patches.
        every: each so many-th block stays global: 3 means blocks 2, 5, 8 and 11.
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
