"""Augmentation: a function of its key, of the right sizes, and a guest in this process."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torchvision import tv_tensors
from torchvision.transforms import v2

from foveate.data import (
    Augment,
    Transform,
    eval_transform,
    read_image,
    seeded,
    train_transform,
)
from foveate.data import augment as module


def pixels(transform: Transform, image: Any, *key: int) -> np.ndarray:
    """What a transform makes of an image, seeded as a loader does."""
    with seeded(key or (0,)):
        return np.asarray(transform({"image": image})["image"])


NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
SMALL = NOISE[:28, :28]
RAND = "rand-m9-mstd0.5-inc1"
SETTINGS: list[dict[str, Any]] = [
    {"crop": "pad"},
    {"crop": "none"},
    {},
    {"auto": RAND},
    {"crop": "pad", "auto": "augmix-m5"},
    {"crop": "pad", "colour": 0.4},
    {"auto": "3a", "colour": 0.3, "interpolation": "bilinear"},
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image", [PICTURE, PICTURE.convert("L"), NOISE, NOISE[..., :1]])
def test_sizes_and_channels_whatever_comes(options: dict, channels: int, image: Any) -> None:
    before = np.array(image)
    for key in range(5):
        found = pixels(train_transform(Augment(**options), (24, 32), channels), image, 0, key)
        assert found.shape == (channels, 24, 32) and found.dtype == np.uint8
    assert np.array_equal(before, np.array(image))


@pytest.mark.parametrize("options", SETTINGS)
def test_the_key_alone_decides(options: dict) -> None:
    transform = train_transform(Augment(**options), (28, 28), 3)
    first = [pixels(transform, SMALL, 5, key) for key in range(20)]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    other = pickle.loads(pickle.dumps(transform))
    for key in reversed(range(20)):
        assert np.array_equal(pixels(other, SMALL, 5, key), first[key])
        assert np.array_equal(pixels(other, Image.fromarray(SMALL), 5, key), first[key])
    assert len({found.tobytes() for found in first}) >= (2 if options == {"crop": "none"} else 8)


@pytest.mark.parametrize("options", SETTINGS)
def test_the_generators_of_the_process_are_left_as_they_were(options: dict) -> None:
    transform = train_transform(Augment(**options), (28, 28), 3)

    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(()).item(), torch.initial_seed()

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    found = []
    for key in range(3):
        pixels(transform, PICTURE, key)
        found.append(draw())
    assert found == expected
    with pytest.raises(AttributeError):  # nor are they after an error
        pixels(transform, "no image", 0)
    assert random.random() is not None and torch.initial_seed() == 3


def test_the_generators_of_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the generators of the devices were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch, "manual_seed", refuse)
    pixels(train_transform(Augment(auto=RAND), (28, 28), 3), PICTURE, 0)


def test_padding_and_mirroring_pixel_by_pixel() -> None:
    """Every shift and both directions occur, about equally often, and nothing else does."""
    pad = 2
    padded = np.pad(SMALL, ((pad, pad), (pad, pad), (0, 0)))
    flipped = np.pad(SMALL[:, ::-1], ((pad, pad), (pad, pad), (0, 0)))
    expected = {
        base[y : y + 28, x : x + 28].transpose(2, 0, 1).tobytes(): (name, y, x)
        for name, base in (("as it is", padded), ("mirrored", flipped))
        for y in range(5)
        for x in range(5)
    }
    transform = train_transform(Augment(crop="pad", pad=pad), (28, 28), 3)
    counts = dict.fromkeys(expected.values(), 0)
    for key in range(5000):
        counts[expected[pixels(transform, SMALL, 7, key).tobytes()]] += 1
    assert len(counts) == 50 and min(counts.values()) > 60 and max(counts.values()) < 145


@pytest.mark.parametrize("flip", [0.0, 0.25, 1.0])
def test_how_often_images_are_mirrored(flip: float) -> None:
    for crop in ("none", "resized"):
        options: dict[str, Any] = {"crop": crop, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
        transform = train_transform(Augment(flip=flip, **options), (28, 28), 3)
        plain = SMALL.transpose(2, 0, 1)
        found = [pixels(transform, SMALL, key) for key in range(1000)]
        mirrored = sum(np.array_equal(one, plain[..., ::-1]) for one in found)
        kept = sum(np.array_equal(one, plain) for one in found)
        assert mirrored + kept == 1000 and abs(mirrored / 1000 - flip) < 0.05


def test_a_resized_crop_stays_within_its_range() -> None:
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None], (100, 100, 1))
    options: dict[str, Any] = {"scale": (0.25, 0.36), "ratio": (1.0, 1.0), "flip": 0.0}
    transform = train_transform(Augment(interpolation="bilinear", **options), (50, 50), 1)
    spans = [int(np.ptp(pixels(transform, ramp, key))) for key in range(200)]
    assert 47 <= min(spans) <= 51 and 57 <= max(spans) <= 60


def _policy_of(transform: Any) -> Any:
    """timm's policy inside a transform."""
    (step,) = (step for step in transform.steps.transforms if isinstance(step, v2.Lambda))
    return step.lambd


def test_the_strongest_posterize() -> None:
    """At magnitude 10 timm asks Pillow for no bits at all, which its newer versions refuse."""
    transform = train_transform(Augment(auto="rand-m10-n2-inc1", crop="none"), (28, 28), 3)
    for key in range(300):
        pixels(transform, SMALL, key)
    operations = _policy_of(transform).ops
    strongest = next(op for op in operations if op.name == "PosterizeIncreasing")
    assert isinstance(strongest, AugmentOp)
    strongest.prob = 1.0
    assert not np.asarray(strongest(PICTURE)).any()


def test_policies_use_the_interpolation_that_was_given() -> None:
    for name, number in (("nearest", 0), ("bilinear", 2), ("bicubic", 3)):
        augment = Augment(auto=RAND, interpolation=name)
        transform = train_transform(augment, (28, 28), 1)
        assert {op.kwargs["resample"] for op in _policy_of(transform).ops} == {number}


def test_evaluation_is_timms_own() -> None:
    wide = Image.fromarray(np.tile(NOISE, (3, 3, 1)))
    for size in ((32, 32), (24, 40), (40, 24)):
        expected = timm.data.create_transform(
            size, crop_pct=0.875, interpolation="bicubic", use_prefetcher=True
        )(wide)
        found = pixels(eval_transform(size, 3), wide)
        assert np.array_equal(found, np.asarray(expected))
    assert pixels(eval_transform((32, 32), 1), wide).shape == (1, 32, 32)


def test_boxes_and_masks_follow_the_image() -> None:
    """A white square stays inside its box and its mask, whatever is cut, mirrored and resized."""
    canvas = np.zeros((60, 80, 3), np.uint8)
    canvas[20:40, 10:30] = 255
    sample = {
        "image": Image.fromarray(canvas),
        "boxes": tv_tensors.BoundingBoxes(
            [[10, 20, 30, 40]],  # type: ignore[arg-type]
            format="XYXY",
            canvas_size=(60, 80),
        ),
        "masks": tv_tensors.Mask(torch.from_numpy(canvas[None, ..., 0] > 0)),
        "label": 3,
    }
    options: dict[str, Any] = {"scale": (0.5, 1.0), "ratio": (1.0, 1.0)}
    transforms = [train_transform(Augment(**options), (48, 48), 3), eval_transform((48, 64), 3)]
    for transform in transforms:
        for key in range(20):
            with seeded((key,)):
                found = transform(sample)
            white = found["image"][0] > 127
            assert found["label"] == 3 and found["masks"].shape[1:] == white.shape
            assert (found["masks"][0] != white).float().mean() < 0.04  # edges alone
            if white.any():
                rows, columns = white.nonzero().T
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert (found["boxes"][0] - torch.stack(edges)).abs().max() <= 2


def test_tensors_are_taken_as_they_are() -> None:
    for transform in (train_transform(Augment(), (28, 28), 3), eval_transform((28, 28), 3)):
        for image in (torch.rand(3, 28, 28), torch.zeros(3, 28, 28, dtype=torch.uint8)):
            assert transform({"image": image})["image"] is image
        with pytest.raises(ValueError, match=r"is \[3, 27, 28\], and the model takes \[3"):
            transform({"image": torch.rand(3, 27, 28)})
        with pytest.raises(ValueError, match="holds torch.int64: uint8 or floating-point numbers"):
            transform({"image": torch.zeros(3, 28, 28, dtype=torch.int64)})


def test_images_of_the_size_stay_as_they_are() -> None:
    expected = SMALL.transpose(2, 0, 1)
    for image in (SMALL, Image.fromarray(SMALL)):
        assert np.array_equal(pixels(eval_transform((28, 28), 3), image), expected)
    grey = pixels(eval_transform((28, 28), 3), SMALL[..., :1])
    assert np.array_equal(grey, np.repeat(expected[:1], 3, 0))


def test_tiny_images(tmp_path) -> None:  # noqa: ANN001
    Image.new("RGB", (1, 300), "red").save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    for options in SETTINGS:
        assert pixels(train_transform(Augment(**options), (28, 28), 3), image).shape == (3, 28, 28)
    assert pixels(eval_transform((28, 28), 3), image).shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "padd"}, "crop must be one of 'resized', 'pad', 'none'; got 'padd'"),
        ({"interpolation": "box"}, "interpolation must be one of 'nearest'"),
        ({"scale": (0.5, 0.2)}, r"scale must be two ascending numbers above 0 up to 1, got"),
        ({"scale": (0.0, 1.0)}, r"scale must be two ascending numbers"),
        ({"scale": (0.1, 1.5)}, r"scale must be two ascending numbers"),
        ({"scale": 0.5}, r"scale must be two ascending numbers .* got 0\.5"),
        ({"ratio": (1.0,)}, r"ratio must be two ascending numbers above 0, got \(1\.0,\)"),
        ({"ratio": ("1", "2")}, r"ratio must be two ascending numbers"),
        ({"scale": (float("nan"), 1.0)}, r"scale must be two ascending numbers"),
        ({"pad": -1}, "pad must be a whole number of pixels from 0, got -1"),
        ({"pad": True}, "pad must be a whole number of pixels from 0, got True"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1\.5"),
        ({"colour": -0.1}, "colour must be 0 or more, got -0.1"),
        ({"colour": "much"}, "colour must be 0 or more, got 'much'"),
        ({"auto": "rnd-m9"}, "auto must be a policy of timm such as \"rand-m9-.*got 'rnd-m9'"),
        ({"auto": "rand-q9"}, "auto must be a policy of timm"),
        ({"auto": ""}, "auto must be a policy of timm .*: it is empty"),
    ],
)
def test_wrong_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Augment(**options)
    assert "\n" not in str(error.value)


def test_lists_of_yaml_become_tuples() -> None:
    augment = Augment(scale=[0.5, 1], ratio=[1, 2])  # type: ignore[arg-type]
    assert augment == Augment(scale=(0.5, 1.0), ratio=(1.0, 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 28), 3), r"size must be a height and a width in pixels, got \(0, 28\)"),
        (((28, 28), 2), "channels must be one of 1, 3; got 2"),
        (((28, 28), 3, 1.5), r"crop_pct must lie in \(0, 1\], got 1\.5"),
        (((28, 28), 3, 0.9, "cubic"), "interpolation must be one of"),
    ],
)
def test_wrong_outputs(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_transform(*arguments)
    assert module.CROPS[0] == Augment().crop
