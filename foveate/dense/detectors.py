"""torchvision's Faster R-CNN and Mask R-CNN on a vision transformer, with SViT's settings.

Paper: Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation",
WACV 2024, which takes Mask R-CNN with a feature pyramid network as ViT-Adapter has it.

torchvision gives its backbones padded images and nothing else. These detectors also give the sizes,
so that no padding becomes a token, a proposal or a part of a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from foveate.backbones import image_settings
from foveate.core import Outcome
from foveate.dense.backbone import DenseBackbone, DenseModel, Features, Images
from foveate.dense.canvas import Size
from foveate.dense.fpn import FpnBackbone
from foveate.dense.labels import classes_of_objects
from foveate.dense.samples import over_processes, sampled
from foveate.dense.vit_adapter import adapter

__all__ = [
    "Preparation",
    "ViTFasterRCNN",
    "ViTMaskRCNN",
    "as_backbone",
    "check_count",
    "check_images",
    "faster_rcnn",
    "mask_rcnn",
]

Target = dict[str, Tensor]
_M = TypeVar("_M", bound="_Detector")
_RATIOS = (0.5, 1.0, 2.0)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_FAR = 1e4  # pixels: anchors in the padding are moved this far, so that they match no object


class _Detector(DenseModel):
    """Base class of both detectors; it adds image sizes and the method's losses to torchvision's.

    Labels count from 0 in targets and predictions, as in this package's data sets; only torchvision
    counts the background as a class.
    """

    rpn: Any
    roi_heads: Any
    backbone: FpnBackbone
    uncounted = "the heads behind the proposals (boxes and masks)"

    @property
    def pixel_classes(self) -> int:
        """Number of classes that a pixel may have, background included."""
        return self.num_classes + 1

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor] | list[Target]:
        """Return losses in training mode, else boxes, labels, scores (and masks) of each image.

        The losses are torchvision's and the method's own weighted ones, such as ``loss_ratio``;
        training minimises their sum. They are means over what all processes that train together
        have sampled.

        Args:
            images: images ``[channels, h, w]`` with values from 0 to 1, of any sizes.
            targets: for training, ``boxes`` (x1, y1, x2, y2 in pixels), ``labels`` and ``masks`` of
                each image.
            seeds: for training, a number for each image, by which its samples of anchors and
                proposals are drawn; None draws all of them from torch's generator.
        """
        return self.run(images, targets, seeds)[0]

    def run(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> tuple[dict[str, Tensor] | list[Target], Outcome]:
        """Return what ``forward`` returns, and the outcome of the pass."""
        check_images(images)
        if self.training:
            self._check(images, targets)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        given = None
        if targets is not None:
            given = [{**target, "labels": target["labels"] + 1} for target in targets]
        batch, given = self.transform(list(images), given)
        found = self.backbone.features(batch)
        with sampled(self.rpn, seeds) as anchors:
            proposals, losses = self.rpn(batch, found.maps, given)
        # RoIAlign repeats the border of a map, so the border of each image is repeated here.
        maps = {
            name: found.canvas.extend(values, scale)
            for (name, values), scale in zip(found.maps.items(), self.backbone.scales, strict=True)
            if name != "pool"
        }
        with sampled(self.roi_heads, seeds) as boxed:
            boxes, more = self.roi_heads(maps, proposals, batch.image_sizes, given)
        outcome = found.outcome
        if self.training:
            assert given is not None
            classes = None
            if self.reducer.pixel_classes:
                grid = outcome.state.context.grid
                classes = classes_of_objects(given, batch.image_sizes, found.canvas, grid)
            own = over_processes({**losses, **more}, anchors, boxed)
            return {**own, **self.method_losses(outcome, classes)}, outcome
        answers = self.transform.postprocess(boxes, batch.image_sizes, sizes)
        return [{**answer, "labels": answer["labels"] - 1} for answer in answers], outcome

    def fixed(self, images: Images) -> Features:
        found = self.backbone.features(images)
        self.rpn.head(list(found.maps.values()))
        return found

    def _check(self, images: Sequence[Tensor], targets: Sequence[Target] | None) -> None:
        check_count("a target", images, targets)
        needed = ("boxes", "labels", *(("masks",) if self.roi_heads.has_mask() else ()))
        for number, (image, target) in enumerate(zip(images, targets or (), strict=True)):
            for missing in [name for name in needed if name not in target]:
                raise ValueError(
                    f"the target of image {number} has no {missing!r}, which this detector learns "
                    f"from; it has {', '.join(target) or 'nothing'}"
                )
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4 or len(labels) != len(boxes):
                raise ValueError(
                    f"boxes must be [N, 4] with N labels, got {list(boxes.shape)} and "
                    f"{list(labels.shape)} for image {number}"
                )
            height, width = image.shape[-2:]
            if "masks" in needed and target["masks"].shape != (len(boxes), height, width):
                raise ValueError(
                    f"masks must be {[len(boxes), height, width]}, as boxes and image are, got "
                    f"{list(target['masks'].shape)} for image {number}"
                )
            _check_boxes(boxes, height, width, number)
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"labels must lie in 0..{self.num_classes - 1}, got "
                    f"{int(labels.min())}..{int(labels.max())} for image {number}"
                )


def check_images(images: Sequence[Tensor]) -> None:
    """Refuse a batch without images."""
    if not len(images):
        raise ValueError("at least one image is needed, got none")


def check_count(what: str, images: Sequence[Tensor], targets: Sequence[Any] | None) -> None:
    """Refuse targets that are not one for each image; ``what`` names one of them."""
    if targets is None or len(targets) != len(images):
        found = "none" if targets is None else len(targets)
        raise ValueError(f"training needs {what} for each of {len(images)} images, got {found}")


def _check_boxes(boxes: Tensor, height: int, width: int, number: int) -> None:
    """Refuse boxes that nothing can be learnt from, or that torchvision would crash on."""
    first, last = boxes[:, :2], boxes[:, 2:]
    faults = {
        "contains NaN or infinity": ~boxes.isfinite().all(1),
        "has no area": (last <= first).any(1),
        f"lies outside of its {height} x {width} pixels": (last <= 0).any(1)
        | (first >= first.new_tensor([width, height])).any(1),
    }
    if not bool(torch.stack([*faults.values()]).any()):  # one question to the GPU, not three
        return
    for words, wrong in faults.items():
        for which in wrong.nonzero().flatten().tolist()[:1]:
            raise ValueError(f"box {boxes[which].tolist()} of image {number} {words}")


class ViTFasterRCNN(_Detector, FasterRCNN):
    """Faster R-CNN on a ``FpnBackbone``; see ``faster_rcnn``."""


class ViTMaskRCNN(_Detector, MaskRCNN):
    """Mask R-CNN on a ``FpnBackbone``; see ``mask_rcnn``."""


class _Anchors(AnchorGenerator):
    """Makes anchors at the exact strides of the maps, and moves those in the padding far away."""

    def __init__(
        self, sizes: Sequence[float], patch: tuple[int, int], scales: Sequence[float]
    ) -> None:
        super().__init__(tuple((size,) for size in sizes), (_RATIOS,) * len(sizes))
        self.strides = [(patch[0] / scale, patch[1] / scale) for scale in scales]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, ``[A, 4]`` float32."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)  # half precision would round their places
        grids = [list(values.shape[-2:]) for values in feature_maps]
        strides = [[torch.tensor(side, device=device) for side in pair] for pair in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [
            anchors + _in_padding(anchors, size)[:, None] * _FAR for size in image_list.image_sizes
        ]


def _in_padding(anchors: Tensor, size: Size) -> Tensor:
    """Return which anchors have their middle outside of the image, ``[A]`` bool."""
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (middle >= middle.new_tensor(size[::-1])).any(1)


class _Proposals(RegionProposalNetwork):
    """torchvision's proposal network, but anchors in the padding neither propose nor train.

    Otherwise they would take places among the best proposals and the sampled negatives, and an
    image beside a larger one would have fewer of its own.
    """

    @classmethod
    def like(cls, made: Any) -> _Proposals:
        """Make one with the head and the settings of torchvision's."""
        matcher, sampler = made.proposal_matcher, made.fg_bg_sampler
        return cls(
            made.anchor_generator,
            made.head,
            matcher.high_threshold,
            matcher.low_threshold,
            sampler.batch_size_per_image,
            sampler.positive_fraction,
            made._pre_nms_top_n,
            made._post_nms_top_n,
            made.nms_thresh,
            made.score_thresh,
        )

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals of each image, and in training mode the losses."""
        maps = list(features.values())
        by_level, deltas_by_level = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        padding = torch.stack(
            [_in_padding(own, size) for own, size in zip(anchors, images.image_sizes, strict=True)]
        )
        objectness, deltas = concat_box_prediction_layers(by_level, deltas_by_level)
        proposals = self.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        visible = objectness.detach().view_as(padding).masked_fill(padding, -math.inf)
        counts = [level[0].numel() for level in by_level]
        boxes, _ = self.filter_proposals(proposals, visible, images.image_sizes, counts)
        if not self.training:
            return boxes, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        ignored = -1.0  # the sampler takes neither positives nor negatives of this label
        labels = [own.masked_fill(out, ignored) for own, out in zip(labels, padding, strict=True)]
        wanted = self.box_coder.encode(matched, anchors)
        of_objects, of_boxes = self.compute_loss(objectness, deltas, labels, wanted)
        return boxes, {"loss_objectness": of_objects, "loss_rpn_box_reg": of_boxes}


def _roi_align(
    maps: Sequence[str], size: int, strides: Sequence[float], canonical: tuple[int, int]
) -> MultiScaleRoIAlign:
    """Make a RoIAlign with known strides; torchvision's would guess them from the first batch."""
    pool = MultiScaleRoIAlign(list(maps), size, 2, canonical_scale=canonical[0])
    pool.scales = [1 / stride for stride in strides]
    first, last = (round(math.log2(strides[n])) for n in (0, -1))
    pool.map_levels = initLevelMapper(first, last, canonical[0], canonical[1])
    return pool


def as_backbone(vit: nn.Module) -> DenseBackbone:
    """Return a dense backbone as it is, and put ViT-Adapter around a ViT."""
    return vit if isinstance(vit, DenseBackbone) else adapter(vit)


class Preparation(GeneralizedRCNNTransform):
    """Normalises images as the ViT expects, resizes them and pads them, like torchvision.

    Attributes:
        image_size: length of the shorter side of an image after resizing, and the largest length of
            its longer side; None leaves images as they are.
        resizes_training: whether training images are resized too; False is for images that
            augmentation has resized.
    """

    resizes_training: bool = True

    def __init__(self, body: DenseBackbone, image_size: tuple[int, int] | None) -> None:
        mean, std = _image_statistics(body)
        shorter, longer = image_size or (1, 1)
        super().__init__(shorter, longer, mean, std, size_divisible=body.size_divisible)
        self.image_size = image_size

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Resize an image with its boxes and masks, unless images keep their size."""
        if self.image_size is None or (self.training and not self.resizes_training):
            return image, target
        # Resize as torchvision does, but with antialiasing, like the augmentation in training.
        short, long = self.image_size
        sides = image.shape[-2:]
        factor = min(short / min(sides), long / max(sides))
        size = [max(1, int(side * factor)) for side in sides]
        if factor == 1:
            return image, target
        resized = F.interpolate(
            image[None], size=size, mode="bilinear", align_corners=False, antialias=True
        )
        if target is not None:
            target = {**target, "boxes": resize_boxes(target["boxes"], list(sides), size)}
            if "masks" in target:
                masks = F.interpolate(target["masks"][:, None].float(), size=size)  # nearest pixel
                target["masks"] = masks[:, 0].byte()
        return resized[0], target


def _image_statistics(body: DenseBackbone) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation that the ViT expects images to be normalised by."""
    stated = {**_IMAGENET, **image_settings(body.reduced.vit)}
    channels = body.reduced.backbone.channels
    found = {name: list(stated[name]) for name in ("mean", "std")}
    for name, values in found.items():
        if len(values) != channels:  # ImageNet's have three channels
            found[name] = [sum(values) / len(values)] * channels
    return found["mean"], found["std"]


def _settings(
    vit: nn.Module,
    num_classes: int,
    *,
    channels: int,
    box_channels: int,
    anchor_scale: float,
    proposals: tuple[int, int],
    detections: int,
    canonical: tuple[int, int],
) -> dict[str, Any]:
    """Make the arguments that both of torchvision's constructors take."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1 (without background), got {num_classes}")
    body = as_backbone(vit)
    backbone = FpnBackbone(body, channels)
    patch = body.reduced.backbone.spec.patch
    strides = [max(patch) / scale for scale in backbone.scales]
    names = [str(n) for n in range(len(body.scales))]
    return {
        "backbone": backbone,
        "rpn_anchor_generator": _Anchors(
            [anchor_scale * stride for stride in strides], patch, backbone.scales
        ),
        "rpn_post_nms_top_n_train": proposals[0],
        "rpn_post_nms_top_n_test": proposals[1],
        "rpn_nms_thresh": 0.7,
        "box_roi_pool": _roi_align(names, 7, strides[:-1], canonical),
        "box_head": TwoMLPHead(channels * 7 * 7, box_channels),
        "box_predictor": FastRCNNPredictor(box_channels, num_classes + 1),
        "box_score_thresh": 0.05,
        "box_nms_thresh": 0.5,
        "box_detections_per_img": detections,
    }


def _finished(model: _M, num_classes: int, image_size: tuple[int, int] | None) -> _M:
    model.num_classes = num_classes
    model.reducer.for_pixels(model.pixel_classes)
    model.transform = Preparation(model.backbone.body, image_size)
    model.rpn = _Proposals.like(model.rpn)
    return model


def faster_rcnn(
    vit: nn.Module,
    num_classes: int,
    *,
    channels: int = 256,
    box_channels: int = 1024,
    anchor_scale: float = 8.0,
    proposals: tuple[int, int] = (1000, 1000),
    detections: int = 100,
    image_size: tuple[int, int] | None = (800, 1333),
    canonical: tuple[int, int] = (224, 4),
    **options: Any,
) -> ViTFasterRCNN:
    """Make a Faster R-CNN on a vision transformer. The defaults are the paper's settings.

    Args:
        vit: a ViT, plain or reduced, which gets a ViT-Adapter; or a dense backbone.
        num_classes: number of classes of objects, without background.
        channels: channels of the feature pyramid network.
        box_channels: width of the box head's two layers.
        anchor_scale: side of an anchor in cells of its map.
        proposals: number of proposals that are kept in training and in evaluation.
        detections: largest number of boxes that are returned for an image.
        image_size: length of the shorter side of an image after resizing, and the largest length of
            its longer side; None leaves images as they are.
        canonical: side of a box in pixels, and the level (as a power of two of its stride) that
            boxes of that size are read from.
        options: further settings of torchvision's ``FasterRCNN``.
    """
    settings = _settings(
        vit,
        num_classes,
        channels=channels,
        box_channels=box_channels,
        anchor_scale=anchor_scale,
        proposals=proposals,
        detections=detections,
        canonical=canonical,
    )
    return _finished(ViTFasterRCNN(**{**settings, **options}), num_classes, image_size)


def mask_rcnn(
    vit: nn.Module,
    num_classes: int,
    *,
    channels: int = 256,
    box_channels: int = 1024,
    mask_channels: int = 256,
    mask_layers: int = 4,
    anchor_scale: float = 8.0,
    proposals: tuple[int, int] = (1000, 1000),
    detections: int = 100,
    image_size: tuple[int, int] | None = (800, 1333),
    canonical: tuple[int, int] = (224, 4),
    **options: Any,
) -> ViTMaskRCNN:
    """Make a Mask R-CNN on a vision transformer. The defaults are the paper's settings.

    Args:
        vit: a ViT, plain or reduced, which gets a ViT-Adapter; or a dense backbone.
        num_classes: number of classes of objects, without background.
        channels: channels of the feature pyramid network.
        box_channels: width of the box head's two layers.
        mask_channels: channels of the mask head.
        mask_layers: convolutions of the mask head.
        anchor_scale: side of an anchor in cells of its map.
        proposals: number of proposals that are kept in training and in evaluation.
        detections: largest number of boxes that are returned for an image.
        image_size: length of the shorter side of an image after resizing, and the largest length of
            its longer side; None leaves images as they are.
        canonical: side of a box in pixels, and the level (as a power of two of its stride) that
            boxes of that size are read from.
        options: further settings of torchvision's ``MaskRCNN``.
    """
    settings = _settings(
        vit,
        num_classes,
        channels=channels,
        box_channels=box_channels,
        anchor_scale=anchor_scale,
        proposals=proposals,
        detections=detections,
        canonical=canonical,
    )
    box_pool = settings["box_roi_pool"]
    strides = [1 / scale for scale in box_pool.scales]
    settings |= {
        "mask_roi_pool": _roi_align(box_pool.featmap_names, 14, strides, canonical),
        "mask_head": MaskRCNNHeads(channels, (mask_channels,) * mask_layers, 1),
        "mask_predictor": MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1),
    }
    return _finished(ViTMaskRCNN(**{**settings, **options}), num_classes, image_size)
