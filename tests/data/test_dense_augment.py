"""Images with boxes, masks and maps: everything moves together, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from foveate.data import (
    DenseAugment,
    Loader,
    dense_eval_transform,
    dense_train_transform,
    listed,
    open_source,
    seeded,
)

QUIET = {"flip": 0.0, "interpolation": "nearest"}


def made(height: int = 60, width: int = 80, crowds: bool = False) -> dict[str, Any]:
    """Two rectangles, bright in the image, with boxes, masks and a map."""
    corners = [(10, 5, 30, 25), (40, 20, 72, 56)]
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = 1
    semantic = masks[0] + 2 * masks[1]
    image = np.repeat((100 * semantic.numpy()).astype(np.uint8)[..., None], 3, 2)
    boxes = torch.tensor(corners, dtype=torch.float32)
    return {
        "image": Image.fromarray(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "masks": tv_tensors.Mask(masks),
        "semantic": tv_tensors.Mask(semantic),
        "labels": torch.tensor([3, 4]),
        "iscrowd": torch.tensor([0, int(crowds)]),
        "area": masks.flatten(1).sum(1).float(),
        "image_id": 9,
    }


def consistent(sample: dict[str, Any]) -> None:
    """Boxes are those of their masks, and masks lie where the image is as bright."""
    image, masks = sample["image"], sample["masks"]
    assert image.dtype == torch.uint8 and sample["boxes"].canvas_size == image.shape[-2:]
    assert len(sample["boxes"]) == len(masks) == len(sample["labels"]) == len(sample["iscrowd"])
    assert masks.shape[-2:] == image.shape[-2:] == sample["semantic"].shape
    assert torch.equal(image[0], 100 * sample["semantic"])
    for box, mask, label, area in zip(
        sample["boxes"], masks, sample["labels"], sample["area"], strict=True
    ):
        assert (image[0][mask > 0] == 100 * (label - 2)).all() and mask.sum() == area > 0
        rows, columns = torch.where(mask > 0)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.allclose(box, torch.stack(around).float(), atol=2.0)


def changed(seed: int, sample: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    transform = dense_train_transform(DenseAugment(**{**QUIET, **options}), 3)
    with seeded((seed,)):
        found: dict[str, Any] = transform(made() if sample is None else sample)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"short": (90, 120), "long": 150},
        {"resize": "none", "flip": 0.5},
        {"resize": "jitter", "crop": (48, 48), "jitter": (0.5, 2.0)},
        {"short": (90, 120), "long": 150, "crop": (40, 50), "flip": 0.5},
        {"short": (50,), "long": 90, "zoom": 0.7},
    ],
)
def test_everything_moves_together(options: dict[str, Any]) -> None:
    counts = set()
    for seed in range(12):
        sample = changed(seed, **options)
        consistent(sample)
        assert sample["original_size"] == (60, 80) and sample["image_id"] == 9
        counts.add(len(sample["labels"]))
    assert 2 in counts and (options.get("crop") is None or len(counts) > 1)


def test_sizes() -> None:
    sizes = {changed(seed, short=(30, 45), long=1000)["image"].shape for seed in range(10)}
    assert sizes == {(3, 30, 40), (3, 45, 60)}
    assert changed(0, short=(60,), long=40)["image"].shape == (3, 30, 40)
    crop = {"resize": "jitter", "crop": (48, 32), "jitter": (1.0, 1.0)}
    assert changed(0, **crop)["image"].shape == (3, 24, 32)  # fits in, and is not padded
    assert changed(0, **{**crop, "jitter": (3.0, 3.0)})["image"].shape == (3, 48, 32)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 10_000), (3, 2)])
def test_odd_sizes(height: int, width: int) -> None:
    """Smaller than a patch, or 10 000 pixels wide: at least a pixel is left."""
    sample = {"image": Image.new("RGB", (width, height))}
    found = changed(0, sample, short=(800,), crop=(64, 64))["image"]
    assert found.shape[0] == 3 and min(found.shape) >= 1 and max(found.shape) <= 64
    resized = dense_eval_transform(3)(sample)["image"]
    assert 1 <= min(resized.shape[1:]) and max(resized.shape) <= 1333


def test_crowds_are_not_trained_on() -> None:
    sample = changed(0, made(crowds=True), resize="none")
    assert sample["labels"].tolist() == [3] and sample["masks"].shape == (1, 60, 80)
    assert len(sample["area"]) == len(sample["iscrowd"]) == len(sample["boxes"]) == 1


def test_an_image_without_objects() -> None:
    source = open_source("scenes:size=32,train=40")
    empty = next(i for i in range(40) if not len(source.targets(i)["labels"]))
    transform = dense_train_transform(DenseAugment(short=(40,), crop=(24, 24)), 1)
    with seeded((0,)):
        sample = transform(source.sample(empty))
    assert sample["boxes"].shape == (0, 4) and sample["masks"].shape == (0, 24, 24)
    assert sample["image"].shape == (1, 24, 24) and not sample["semantic"].any()


def test_boxes_end_where_a_crop_ends_them() -> None:
    """Of an L that is cut, the box is that of what is left."""
    sample = made()
    mask = torch.zeros(1, 60, 80, dtype=torch.uint8)
    mask[0, 10:50, 10:14] = mask[0, 46:50, 10:70] = 1
    sample |= {"masks": tv_tensors.Mask(mask), "semantic": tv_tensors.Mask(mask[0])}
    sample["boxes"] = sample["boxes"][:1]
    sample["boxes"] = tv_tensors.BoundingBoxes(
        [[10.0, 10, 70, 50]], format="XYXY", canvas_size=(60, 80)
    )
    for key in ("labels", "iscrowd", "area"):
        sample[key] = sample[key][:1]
    tight = 0
    for seed in range(20):
        found = changed(seed, sample, resize="none", crop=(30, 30))
        for box, left in zip(found["boxes"].tolist(), found["masks"], strict=True):
            rows, columns = torch.where(left > 0)
            ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == [float(end) for end in ends]
            tight += box[2] - box[0] == 4
    assert tight


def test_a_crop_is_not_of_one_class() -> None:
    def shares(most: float) -> list[float]:
        found = []
        for seed in range(20):
            semantic = changed(seed, resize="none", crop=(16, 16), max_share=most)["semantic"]
            counts = torch.bincount(semantic.flatten().int())
            found.append(float(counts.max() / counts.sum()))
        return found

    assert np.mean(np.array(shares(0.75)) <= 0.75) > 0.8 > np.mean(np.array(shares(1.0)) <= 0.75)


def test_evaluation_resizes_the_image_alone() -> None:
    sample = dense_eval_transform(3, 120, 1000)(made())
    assert sample["image"].shape == (3, 120, 160) and sample["original_size"] == (60, 80)
    assert torch.equal(sample["masks"], made()["masks"])
    assert torch.equal(sample["boxes"], made()["boxes"]) and len(sample["iscrowd"]) == 2
    assert dense_eval_transform(3, None)(made())["image"].shape == (3, 60, 80)


def test_tensors_are_taken_too() -> None:
    sample = {"image": torch.full((3, 20, 30), 9, dtype=torch.uint8)}
    assert changed(0, sample, short=(40,))["image"].shape == (3, 40, 60)
    with pytest.raises(ValueError, match=r"is \[3, 20, 30\], and the model takes 1 channels"):
        dense_eval_transform(1)(sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_different_sizes(workers: int) -> None:
    source = open_source("scenes:size=48,train=12")
    augment = DenseAugment(short=(40, 56, 64), long=80, colour=0.2)
    loader = Loader(
        source,
        dense_train_transform(augment, 1),
        batch=6,
        collate=listed,
        workers=workers,
        seed=1,
    )
    batches = list(loader)
    sizes = {tuple(image.shape) for batch in batches for image in batch["image"]}
    assert len(batches) == 2 and len(sizes) > 1
    for batch in batches:
        assert len(batch["image"]) == len(batch["targets"]) == len(batch["index"]) == 6
        for image, target, index in zip(
            batch["image"], batch["targets"], batch["index"].tolist(), strict=True
        ):
            assert type(image) is torch.Tensor and type(target["boxes"]) is torch.Tensor
            assert target["masks"].shape[-2:] == image.shape[-2:]
            assert target["image_id"] == index
            known = source.targets(index)["labels"]
            assert torch.equal(target["labels"], known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "long"}, "resize must be one of"),
        ({"short": ()}, "short must be some numbers"),
        ({"short": (0,)}, "short must be whole numbers of pixels from 1"),
        ({"long": 2.5}, "long must be whole numbers"),
        ({"crop": (3,)}, "crop must be 2 numbers"),
        ({"jitter": (2.0, 1.0)}, "jitter must be two ascending factors"),
        ({"resize": "jitter"}, "resize=jitter needs crop"),
        ({"flip": 2}, r"flip must lie in \[0, 1\]"),
        ({"zoom": -1}, r"zoom must lie in \[0, 1\]"),
        ({"max_share": 0}, r"max_share must lie in \(0, 1\]"),
        ({"colour": -1}, "colour must be 0 or more"),
        ({"interpolation": "area"}, "interpolation must be one of"),
    ],
)
def test_settings_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseAugment(**options)


def test_yaml_gives_lists() -> None:
    augment = DenseAugment(short=[1, 2], crop=[3, 4], jitter=[1, 2])  # type: ignore[arg-type]
    assert (augment.short, augment.crop, augment.jitter) == ((1, 2), (3, 4), (1, 2))
