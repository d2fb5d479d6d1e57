"""The recipes of detection and segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from foveate.core.schedule import check_choice
from foveate.data import DenseAugment
from foveate.dense.backbone import GONE
from foveate.dense.build import BACKBONES, DETECTORS, SEGMENTERS, check_part
from foveate.train.recipe import Data, Model, Recipe, at_least, checked_weights, one_word

__all__ = ["DenseData", "DenseRecipe", "Detect", "Segment"]


@dataclass(kw_only=True)
class DenseData(Data):
    """Images with objects or label maps, and how they become batches.

    Attributes:
        crop_pct: without effect; evaluation sees whole images.
        augment: what is done to training images.
        short: length in pixels to which the short side of an image is resized in evaluation and by
            the trained model; None leaves the size.
        long: largest length of the long side in evaluation, in pixels.
    """

    augment: DenseAugment = field(default_factory=DenseAugment)  # type: ignore[assignment]
    batch: int = 2
    short: int | None = 800
    long: int = 1333

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.short is not None:
            at_least("data.short", self.short, 1)
            at_least("data.long", self.long, self.short)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Sides in evaluation, as dense models take them."""
        return None if self.short is None else (self.short, self.long)


@dataclass(kw_only=True)
class DenseRecipe(Recipe):
    """The settings that detection and segmentation share.

    Attributes:
        model: the ViT and its first weights; or with ``start`` a detector or segmenter of an
            earlier run, which is trained on as a whole.
        data: images and batches.
        backbone: how feature maps are made from the ViT: a name, "adapter" or "pyramid", and
            options of that function of foveate.dense, such as backbone.name=pyramid
            backbone.norm=layer. None takes the one of ``model.start``, or else the adapter.
        head: the head that predicts, and its options.
        method: reduction method with its options, such as "svit(keep=0.7)"; None computes all
            tokens.
        gone: what the maps hold where the method has dropped a patch: its "last" value or "zero".
            None takes the backbone's default.
        class_token: give a ViT without a class token a new one, which is trained too; for methods
            that read class attention.
        weights: factors of the losses that replace 1 and the method's own, such as
            weights.ratio=4.
    """

    model: Model
    data: DenseData = field(default_factory=DenseData)
    backbone: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    method: str | dict[str, Any] | None = None
    gone: str | None = None
    class_token: bool = False
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method is not None:
            self.method = one_word(self.method)
        if self.backbone is not None:
            check_part("backbone", self.backbone, BACKBONES)
        check_choice("gone", self.gone, (None, *GONE))
        checked_weights(self.weights)


@dataclass(kw_only=True)
class Detect(DenseRecipe):
    """Training of a detector, with or without a method.

    Attributes:
        head: the head that predicts: a name, "mask_rcnn" or "faster_rcnn" (boxes without masks),
            and options of that function of foveate.dense. None takes the one of ``model.start``, or
            else mask_rcnn.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is not None:
            check_part("head", self.head, DETECTORS)


@dataclass(kw_only=True)
class Segment(DenseRecipe):
    """Training of a network for semantic segmentation, with or without a method.

    Attributes:
        head: the head that predicts: a name, "fpn" (the light one) or "upernet", and options of
            foveate.dense.segmenter. None takes the one of ``model.start``, or else fpn.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is not None:
            check_part("head", self.head, SEGMENTERS)
