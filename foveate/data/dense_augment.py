"""Transforms of images with boxes, masks and label maps, for detectors and segmenters.

Boxes and masks move with the pixels. Images of a batch may differ in size, and nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from foveate.core.schedule import check_choice
from foveate.data.augment import INTERPOLATIONS, Picture, Transform, pixels
from foveate.data.sources import IGNORE

__all__ = ["RESIZES", "DenseAugment", "dense_eval_transform", "dense_train_transform"]

RESIZES = ("short", "jitter", "none")
_PER_OBJECT = ("boxes", "masks", "labels", "iscrowd", "area")
# A part that is cut out before resizing: DETR's sizes, which SViT's detectors train with.
_ZOOM_SHORT, _ZOOM_PART = (400, 500, 600), (384, 600)
_TRIES = 10  # to find a crop that one class does not fill


@dataclass(kw_only=True)
class DenseAugment:
    """What is done to training images with boxes, masks or label maps.

    Attributes:
        resize: "short" brings the short side to one of ``short``; "jitter" scales the image by a
            random factor of what fits into ``crop``; "none" leaves the size.
        short: lengths in pixels of which the short side gets one at random.
        long: largest length of the long side in pixels where ``resize`` is "short".
        jitter: smallest and largest factor where ``resize`` is "jitter", 0.1 and 2 for the
            large-scale jitter of Mask R-CNN.
        zoom: probability that a part of 384 to 600 pixels a side is cut out before ``resize``.
        crop: height and width in pixels of what is cut out at random; smaller images stay whole.
        max_share: largest share of a crop that one class of the label map may fill, if ten tries
            find such a crop; 1 takes the first.
        flip: probability that the image is mirrored.
        colour: strength of the jitter of brightness, contrast and saturation; 0 for none.
        interpolation: how images are resized: "nearest", "bilinear" or "bicubic".
    """

    resize: str = "short"
    short: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    long: int = 1333
    jitter: tuple[float, float] = (0.1, 2.0)
    zoom: float = 0.0
    crop: tuple[int, int] | None = None
    max_share: float = 1.0
    flip: float = 0.5
    colour: float = 0.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_choice("resize", self.resize, RESIZES)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        self.short = _sides("short", self.short)
        (self.long,) = _sides("long", (self.long,))
        if self.crop is not None:
            self.crop = _sides("crop", self.crop, 2)  # type: ignore[assignment]
        low, high = _numbers("jitter", self.jitter, 2)
        if not 0 < low <= high < float("inf"):
            raise ValueError(f"jitter must be two ascending factors above 0, got {self.jitter!r}")
        self.jitter = low, high
        for name in ("zoom", "flip"):
            (value,) = _numbers(name, (getattr(self, name),))
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
        (share,) = _numbers("max_share", (self.max_share,))
        if not 0 < share <= 1:
            raise ValueError(f"max_share must lie in (0, 1], got {share!r}")
        (colour,) = _numbers("colour", (self.colour,))
        if not 0 <= colour < float("inf"):
            raise ValueError(f"colour must be 0 or more, got {colour!r}")
        if self.resize == "jitter" and self.crop is None:
            raise ValueError("resize=jitter needs crop, the height and width it scales images to")


def _numbers(name: str, given: Any, count: int | None = None) -> tuple[float, ...]:
    """Return numbers as a tuple; YAML gives lists."""
    values = tuple(given) if isinstance(given, (list, tuple)) else ()
    fits = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)
    if not values or not fits or count not in (None, len(values)):
        raise ValueError(f"{name} must be {count or 'some'} numbers, got {given!r}")
    return values


def _sides(name: str, given: Any, count: int | None = None) -> tuple[int, ...]:
    values = _numbers(name, given, count)
    if not all(isinstance(one, int) and one > 0 for one in values):
        raise ValueError(f"{name} must be whole numbers of pixels from 1, got {given!r}")
    return tuple(map(int, values))


def dense_train_transform(augment: DenseAugment, channels: int) -> Transform:
    """Build the transform of training samples into uint8 images and their targets.

    Crowds are left out, because a detector learns single objects; so are objects of which less than
    a pixel is left.
    """
    check_choice("channels", channels, (1, 3))
    a, how = augment, InterpolationMode(augment.interpolation)
    steps: list[Any] = [_single, _Begin(channels)]
    if a.zoom:
        zoom = [_Resize(how, short=_ZOOM_SHORT), _Crop(sides=_ZOOM_PART)]
        steps.append(v2.RandomApply([v2.Compose(zoom)], a.zoom))
    if a.resize == "short":
        steps.append(_Resize(how, short=a.short, long=a.long))
    elif a.resize == "jitter":
        assert a.crop is not None
        steps.append(_Resize(how, into=a.crop, factors=a.jitter))
    if a.crop is not None:
        steps.append(_Crop(size=a.crop, max_share=a.max_share))
    if a.crop is not None or a.zoom:
        steps.append(_tightened)
    if a.flip:
        steps.append(v2.RandomHorizontalFlip(a.flip))
    if a.colour:
        steps.append(v2.ColorJitter(a.colour, a.colour, a.colour))
    return v2.Compose([*steps, _sanitised])


def dense_eval_transform(
    channels: int,
    short: int | None = 800,
    long: int = 1333,
    interpolation: str = "bilinear",
) -> Transform:
    """Build the transform that resizes images by ``short`` and ``long``, and nothing else.

    Boxes, masks and maps stay in the pixels of the file: answers are scaled back to
    "original_size", height and width, and compared there.

    Args:
        channels: of the images, 1 or 3.
        short: length of the short side in pixels; None leaves the size.
        long: largest length of the long side.
        interpolation: "nearest", "bilinear" or "bicubic".
    """
    check_choice("channels", channels, (1, 3))
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    steps: list[Any] = [_Begin(channels)]
    if short is not None:
        (short, long) = _sides("short and long", (short, long))
        resize = _Resize(InterpolationMode(interpolation), short=(short,), long=long)
        steps.append(_OnImage(resize))
    return v2.Compose(steps)


@dataclass(frozen=True)
class _Begin:
    """Turn the image into a tensor, and note its size before that is changed."""

    channels: int

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"]
        if not isinstance(image, Tensor):
            sample = pixels(Picture(self.channels)(sample))
        elif image.ndim != 3 or len(image) != self.channels:
            raise ValueError(f"is {[*image.shape]}, and the model takes {self.channels} channels")
        else:
            sample = {**sample, "image": tv_tensors.Image(image)}
        return {**sample, "original_size": tuple(F.get_size(sample["image"]))}


@dataclass(frozen=True)
class _OnImage:
    """Change the image alone."""

    change: v2.Transform

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "image": self.change(sample["image"])}


def _single(sample: dict[str, Any]) -> dict[str, Any]:
    """Leave out crowds."""
    return _kept(sample, sample["iscrowd"] == 0) if "iscrowd" in sample else sample


def _kept(sample: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """Keep some of the objects, with all their values."""
    changed = {
        key: tv_tensors.wrap(value[keep], like=value)
        if isinstance(value, tv_tensors.TVTensor)
        else value[keep]
        for key, value in sample.items()
        if key in _PER_OBJECT
    }
    return {**sample, **changed}


def _tightened(sample: dict[str, Any]) -> dict[str, Any]:
    """Redraw boxes that end at the border around the part of their masks that a crop has left."""
    if not {"boxes", "masks"} <= set(sample):
        return sample
    boxes, masks = sample["boxes"].as_subclass(Tensor), sample["masks"].as_subclass(Tensor)
    height, width = sample["boxes"].canvas_size
    ends = boxes.new_tensor([width, height])
    cut = ((boxes[:, :2] <= 0) | (boxes[:, 2:] >= ends)).any(1) & (masks > 0).flatten(1).any(1)
    if not cut.any():
        return sample
    around = masks_to_boxes(masks[cut])
    around[:, 2:] += 1  # the library gives the last pixel, and boxes end behind it
    boxes = boxes.clone()
    boxes[cut] = around.to(boxes.dtype)
    return {**sample, "boxes": tv_tensors.wrap(boxes, like=sample["boxes"])}


def _sanitised(sample: dict[str, Any]) -> dict[str, Any]:
    """Leave out objects of which nothing is left, and recompute the areas of the others."""
    if "boxes" not in sample:
        return sample
    _, keep = F.sanitize_bounding_boxes(sample["boxes"])
    if "masks" in sample:
        keep &= (sample["masks"].as_subclass(Tensor) > 0).flatten(1).any(1)
    sample = _kept(sample, keep)
    if "area" in sample:
        left, top, right, bottom = sample["boxes"].as_subclass(Tensor).unbind(1)
        sample["area"] = (
            sample["masks"].as_subclass(Tensor).flatten(1).sum(1).float()
            if "masks" in sample
            else (right - left) * (bottom - top)
        )
    return sample


class _Resize(v2.Transform):
    """Resize the short side to a length, or the image to a size times a random factor."""

    def __init__(
        self,
        interpolation: InterpolationMode,
        *,
        short: tuple[int, ...] = (),
        long: int | None = None,
        into: tuple[int, int] | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.interpolation, self.short, self.long = interpolation, short, long
        self.into, self.factors = into, factors

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        if self.into is None:
            short = self.short[int(torch.randint(len(self.short), ()))]
            factor = short / min(height, width)
            if self.long is not None:
                factor = min(factor, self.long / max(height, width))
        else:
            low, high = self.factors
            factor = low + (high - low) * float(torch.rand(()))
            factor *= min(self.into[0] / height, self.into[1] / width)
        # An image 10 000 pixels wide and 5 high keeps a row.
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(
            F.resize, inpt, params["size"], interpolation=self.interpolation, antialias=True
        )


class _Crop(v2.Transform):
    """Cut out a part at random; an image that is smaller stays whole.

    Args:
        size: height and width of the part.
        sides: or the smallest and largest length of either side.
        max_share: largest share of the part that one class of the label map may fill.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int] = (0, 0),
        sides: tuple[int, int] | None = None,
        max_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.size, self.sides, self.max_share = size, sides, max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        maps = [one for one in flat_inputs if isinstance(one, tv_tensors.Mask) and one.ndim == 2]
        for _ in range(_TRIES if maps and self.max_share < 1 else 1):
            rows, columns = self.size
            if self.sides is not None:
                low, high = self.sides
                rows, columns = (int(torch.randint(low, high + 1, ())) for _ in range(2))
            rows, columns = min(rows, height), min(columns, width)
            top = int(torch.randint(height - rows + 1, ()))
            left = int(torch.randint(width - columns + 1, ()))
            window = {"top": top, "left": left, "height": rows, "width": columns}
            if not maps or self.max_share == 1:
                break
            part = maps[0].as_subclass(Tensor)[top : top + rows, left : left + columns]
            counts = torch.bincount(part.flatten().int(), minlength=IGNORE + 1)[:IGNORE]
            # One class alone is no choice, and of all-ignored parts nothing is learnt.
            if counts.sum() > 0 and counts.max() <= self.max_share * counts.sum():
                break
        return window

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


def _size(flat_inputs: list[Any]) -> tuple[int, int]:
    image = next(one for one in flat_inputs if isinstance(one, tv_tensors.Image))
    height, width = F.get_size(image)
    return height, width
