"""Scenes: the same on every machine, exact to the pixel, and the same from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from foveate.cli import main
from foveate.data import CLASSES, NoSplit, open_source, open_splits
from foveate.data.scenes import PIXEL_CLASSES, _garments, draw_scene
from foveate.data.sources import Scenes, SceneSource, write_scenes

SMALL = "scenes:size=64,train=8,val=4,test=4"


def test_a_scene_follows_from_its_numbers() -> None:
    one, again = (draw_scene((48, 64), 3, 5, "train", 7) for _ in range(2))
    assert one.image.shape == (48, 64, 3) and one.image.dtype == np.uint8
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    for other in ((6, "train", 7), (5, "val", 7), (5, "train", 8)):
        assert (draw_scene((48, 64), 3, *other).image != one.image).any()
    # Not changed by who draws, nor by what is drawn elsewhere.
    np.random.seed(3)
    assert (draw_scene((48, 64), 3, 5, "train", 7).image == one.image).all()


@pytest.mark.parametrize(
    ("scene", "labels", "pixels", "mean"),
    [
        (((96, 96), 1, 0, "train", 1), [9, 4, 0], [536, 475, 514], 111.692),
        (
            ((64, 80), 3, 7, "test", 3),
            [7, 3, 4, 3, 4, 3],
            [101, 122, 146, 282, 212, 213],
            81.085,
        ),
    ],
)
def test_scenes_stay_what_they_are(
    scene: Any, labels: list[int], pixels: list[int], mean: float
) -> None:
    """Numbers of experiments rest on them: whoever changes them measures those anew."""
    found = draw_scene(*scene)
    assert found.labels.tolist() == labels
    assert found.masks.sum((1, 2)).tolist() == pixels
    assert found.image.mean() == pytest.approx(mean, abs=1e-3)


def test_less_clutter_turns_garments_less_and_leaves_the_ground_even() -> None:
    """At 0 nothing but garments stands out of a ground of one brightness."""
    kinds = {}
    for clutter in (0.0, 0.3, 1.0):
        scenes = [draw_scene((64, 64), 1, 0, "train", i, clutter) for i in range(20)]
        kinds[clutter] = [s.image[s.masks.sum(0) == 0].std() for s in scenes]
        assert all(len(scene.labels) == len(scene.masks) for scene in scenes)
    assert np.mean(kinds[0.0]) < np.mean(kinds[0.3]) < np.mean(kinds[1.0])
    plain = draw_scene((64, 64), 1, 0, "train", 3, 0.0)
    assert (plain.image[plain.masks.sum(0) == 0] == 30).mean() > 0.9  # but for soft borders


def test_what_a_scene_holds() -> None:
    scenes = [draw_scene((96, 96), 1, 0, "train", index) for index in range(60)]
    counts = [len(scene.labels) for scene in scenes]
    assert min(counts) == 0 and max(counts) == 6 and np.mean(counts) > 2.5
    assert set(np.concatenate([scene.labels for scene in scenes]).tolist()) == set(range(10))
    for scene in scenes:
        assert scene.masks.sum(0).max(initial=0) <= 1  # what covers is not seen through
        assert all(mask.sum() > 30 for mask in scene.masks)
        semantic = scene.semantic()
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            assert (semantic[mask > 0] == label + 1).all()
        assert ((semantic > 0) == (scene.masks.sum(0) > 0)).all()
    # Clutter, not a blank: hidden edges everywhere, and garments differ from what is around.
    assert all(20 < scene.image.mean() < 200 and scene.image.std() > 8 for scene in scenes)


def test_splits_show_different_garments() -> None:
    seen = [
        {picture.tobytes() for picture in _garments(split).pictures}
        for split in ("train", "val", "test")
    ]
    assert [len(one) for one in seen] == [2400, 600, 2000]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_the_source() -> None:
    source = open_source(SMALL)
    assert len(source) == 8 and source.channels == 1 and source.classes == CLASSES
    assert source.labels_of == ("objects", "pixels") and source.pixel_classes == PIXEL_CLASSES
    sample = source.sample(3)
    assert sample["image"].shape == (64, 64, 1) and sample["image_id"] == 3
    assert isinstance(sample["semantic"], tv_tensors.Mask)
    boxes, masks = sample["boxes"], sample["masks"]
    assert len(boxes) == len(masks) == len(sample["labels"]) > 0
    for box, mask, area in zip(boxes.int().tolist(), masks, sample["area"], strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum() == area
        assert mask[top].any() and mask[bottom - 1].any()
        assert mask[:, left].any() and mask[:, right - 1].any()
    assert "masks" not in source.boxes_only().targets(3)
    assert open_source("scenes").channels == 1 and len(open_source("scenes", "test")) == 500
    assert open_source("scenes:colour=true,size=32x40").image(0).shape == (32, 40, 3)
    assert open_source(SMALL, labels=False).targets(0) == {}
    with pytest.raises(NoSplit, match="has the splits train, val and test, and no all"):
        open_source("scenes", "all")


def test_opening_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits are compared, and large ones open at once."""

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("foveate.data.sources.scenes.draw_scene", refuse)
    splits = open_splits("scenes:train=20000", labels_of="objects")
    assert splits.common["training and validation"] == (0, 500)
    assert splits.test is not None and len(splits.test) == 500


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scenes:sizes=3", "unknown option of scenes 'sizes'; did you mean 'size'"),
        ("scenes:size=9", r"must lie in 32\.\.4096"),
        ("scenes:size=9x", "goes as 96 or 96x128"),
        ("scenes:train=0", "the number of train scenes must be 1 or more, got 0"),
        ("scenes:seed=x", "seed of scenes must be a whole number, got 'x'"),
        ("scenes:seed=99999999999", "seed of scenes must be a whole number"),
        ("scenes:colour=red", "colour of scenes must be true or false"),
        ("scenes:clutter=much", "clutter of scenes must be a number in 0..1, got 'much'"),
        ("scenes:clutter=1.5", "the clutter of scenes must lie in 0..1, got 1.5"),
        ("scenes:", "'scenes:' names no place"),
    ],
)
def test_specs_that_are_wrong(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec)


@pytest.mark.parametrize("colour", [False, True])
def test_a_written_folder_gives_the_same(tmp_path: Path, colour: bool) -> None:
    made = Scenes(size=(48, 64), train=12, val=3, test=2, seed=4, colour=colour)
    write_scenes(tmp_path / "x", made)
    for split in ("train", "val", "test"):
        drawn = SceneSource("scenes", split, made, CLASSES)
        objects = open_source(f"coco:{tmp_path}/x", split)
        pixels = open_source(f"masks:{tmp_path}/x", split)
        assert len(drawn) == len(objects) == len(pixels) == getattr(made, split)
        assert objects.classes == CLASSES and objects.category_ids == drawn.category_ids
        assert pixels.classes == PIXEL_CLASSES
        assert (objects.class_counts() == drawn.class_counts()).all()
        for index in range(len(drawn)):
            one, other = drawn.sample(index), objects.sample(index)
            image = np.asarray(other.pop("image"))
            assert (image == one.pop("image")).all()
            semantic = one.pop("semantic")
            assert torch.equal(semantic, pixels.targets(index)["semantic"])
            assert one.keys() == other.keys()
            assert one.pop("image_id") == other.pop("image_id") == index
            for key, value in one.items():
                assert type(value) is type(other[key]) and value.dtype == other[key].dtype, key
                assert torch.equal(value, other[key]), key
    with pytest.raises(ValueError, match="is there already and not an empty folder"):
        write_scenes(tmp_path / "x", made)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    counts = ["--train", "6", "--val", "2", "--test", "2"]
    assert main(["data", "scenes", str(folder), "--size", "40", "--colour", *counts]) == 0
    assert f"coco:{folder} has their boxes and masks" in capsys.readouterr().out
    assert main(["data", f"coco:{folder}"]) == 0
    text = capsys.readouterr().out
    images = next(line for line in text.splitlines() if "images" in line)
    assert [part.strip() for part in images.split("│")[1:-1]] == ["images", "6", "2", "2"]
    objects = open_source(f"coco:{folder}").class_counts()
    trousers = next(line for line in text.splitlines() if "trousers" in line)
    assert trousers.split("│")[2].strip() == str(objects[1])
    assert main(["data", f"masks:{folder}"]) == 0
    assert "background" in capsys.readouterr().out
    assert main(["data", "fashion-mnist", "--size", "4"]) == 2
    assert "--size is for `foveate data scenes FOLDER`" in capsys.readouterr().err
    assert main(["data", f"coco:{folder}", str(folder)]) == 2
    assert "takes no folder beside it" in capsys.readouterr().err


def test_counting_scenes_shows_its_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    assert main(["data", "scenes:size=32,train=3,val=2,test=1"]) == 0
    out, err = capsys.readouterr()
    for split in ("train", "val", "test"):
        assert f"counting {split}" in err and f"counting {split}" not in out
    assert "trousers" in out
