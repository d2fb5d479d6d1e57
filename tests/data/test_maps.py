"""A class for each pixel: label maps in every usual form and layout."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from foveate.data import IGNORE, NoSplit, Unreadable, open_source, open_splits

MAP = np.array([[0, 1, 2, 2], [0, 255, 2, 1]], dtype=np.uint8)


def write(root: Path, name: str, images: str, maps: str, values: np.ndarray = MAP) -> None:
    for folder in (images, maps):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.full((*values.shape, 3), sum(map(ord, images + name)) % 256, dtype=np.uint8)
    Image.fromarray(pixels).save(root / images / f"{name}.jpg")
    Image.fromarray(values).save(root / maps / f"{name}.png")


@pytest.mark.parametrize(
    ("images", "maps"),
    [
        ("images/train", "masks/train"),
        ("images/training", "annotations/training"),
        ("train/images", "train/labels"),
    ],
)
def test_layouts(tmp_path: Path, images: str, maps: str) -> None:
    for name in "ab":
        write(tmp_path, name, images, maps)
    source = open_source(f"masks:{tmp_path}")
    assert source.classes == source.pixel_classes == ("0", "1", "2")
    assert len(source) == 2 and source.labels_of == ("pixels",)
    sample = source.sample(1)
    assert sample["image"].size == (4, 2) and isinstance(sample["semantic"], tv_tensors.Mask)
    assert sample["semantic"].tolist() == MAP.tolist() and sample["semantic"].dtype == torch.uint8
    assert source.class_counts().tolist() == [4, 4, 6]
    with pytest.raises(NoSplit, match="has the splits train, and no val"):
        open_source(f"masks:{tmp_path}", "val")


def test_two_folders(tmp_path: Path) -> None:
    write(tmp_path, "a", "x", "y")
    source = open_source(f"masks:{tmp_path}/x:{tmp_path}/y", "all")
    assert len(source) == 1
    with pytest.raises(NoSplit, match="has no {split} in it"):
        open_source(f"masks:{tmp_path}/x:{tmp_path}/y")
    write(tmp_path, "a", "x/val", "y/val")
    cut = f"masks:{tmp_path}/x/{{split}}:{tmp_path}/y/{{split}}"
    assert len(open_source(cut, "val")) == 1
    with pytest.raises(NoSplit, match="there is no folder .*x/train"):
        open_source(cut)


def test_zero_may_be_no_class(tmp_path: Path) -> None:
    """As ADE20K has it."""
    write(tmp_path, "a", "images/training", "annotations/training")
    source = open_source(f"masks:{tmp_path}[zero=ignore]")
    assert source.classes == ("0", "1")
    expected = [[IGNORE, 0, 1, 1], [IGNORE, IGNORE, 1, 0]]
    assert source.targets(0)["semantic"].tolist() == expected
    with pytest.raises(ValueError, match="unknown option of masks 'zeros'; did you mean 'zero'"):
        open_source(f"masks:{tmp_path}[zeros=ignore]")
    with pytest.raises(ValueError, match="zero must be ignore"):
        open_source(f"masks:{tmp_path}[zero=1]")


def test_named_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path, "a", f"images/{split}", f"masks/{split}")
    (tmp_path / "classes.txt").write_text("sky\ntree\n")
    source = open_source(f"masks:{tmp_path}")
    assert source.classes == ("sky", "tree")
    with pytest.raises(ValueError, match="a.png has the class 2, and there are 2 classes from 0"):
        source.sample(0)
    (tmp_path / "classes.txt").write_text("sky\ntree\nsea\n")
    splits = open_splits(f"masks:{tmp_path}", labels_of="pixels")
    assert splits.val is not None and splits.val.classes == ("sky", "tree", "sea")


def test_classes_are_counted_on_training_maps(tmp_path: Path) -> None:
    write(tmp_path, "a", "images/train", "masks/train")
    write(tmp_path, "a", "images/val", "masks/val", MAP % 2)
    assert open_source(f"masks:{tmp_path}", "val").classes == ("0", "1", "2")


def test_kinds_of_maps(tmp_path: Path) -> None:
    """16 bits and palettes hold the same numbers; colours are none."""
    for name in ("a", "b", "c"):
        write(tmp_path, name, "images", "masks")
    Image.fromarray(MAP.astype(np.uint16)).save(tmp_path / "masks/a.png")
    palette = Image.fromarray(MAP, mode="P")
    palette.putpalette([255, 0, 0, 0, 255, 0] * 100)
    palette.save(tmp_path / "masks/b.png")
    source = open_source(f"masks:{tmp_path}", "all")
    assert all(source.targets(i)["semantic"].tolist() == MAP.tolist() for i in range(3))
    Image.new("RGB", (4, 2)).save(tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match="a.png is of the mode RGB"):
        source.targets(0)
    Image.fromarray(MAP.astype(np.uint16) + 300).save(tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match=r"has the number 555; classes lie in 0\.\.254"):
        source.targets(0)


def test_maps_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path, name, "images", "masks")
    Image.fromarray(MAP.T).save(tmp_path / "masks/a.png")
    (tmp_path / "masks/b.png").write_bytes((tmp_path / "masks/c.png").read_bytes()[:40])
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    (tmp_path / "masks/c.png").rename(tmp_path / "masks/d.png")
    with caplog.at_level(logging.WARNING):
        source = open_source(f"masks:{tmp_path}", "all")
    assert "1 images without a map" in caplog.text and "c.jpg" in caplog.text
    assert "1 maps without an image" in caplog.text and "d.png" in caplog.text
    with pytest.raises(Unreadable, match="a.png is 2 x 4 pixels, its image .*a.jpg 4 x 2"):
        source.sample(0)
    with pytest.raises(Unreadable, match="b.png"):
        source.sample(1)


def test_subfolders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images of the same name keep their own maps; others are counted with their place."""
    for place, values in (("a", MAP), ("b", MAP % 2)):
        write(tmp_path, "x", f"images/train/{place}", f"masks/train/{place}", values)
    write(tmp_path, "y", "images/train/a", "masks/train")
    with caplog.at_level(logging.WARNING):
        source = open_source(f"masks:{tmp_path}")
    assert len(source) == 2
    assert source.targets(0)["semantic"].tolist() == MAP.tolist()
    assert source.targets(1)["semantic"].tolist() == (MAP % 2).tolist()
    assert "1 images without a map" in caplog.text and "(the first: a/y.jpg)" in caplog.text
    assert "1 maps without an image" in caplog.text and "(the first: y.png)" in caplog.text


def test_two_maps_of_one_image(tmp_path: Path) -> None:
    write(tmp_path, "x", "images", "masks")
    Image.fromarray(MAP % 2).save(tmp_path / "masks/x.tif")
    with pytest.raises(ValueError, match=r"x.png and .*x.tif are maps of the same image; remove"):
        open_source(f"masks:{tmp_path}", "all")


def test_places_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; a folder of images and label maps"):
        open_source("masks:/nowhere")
    with pytest.raises(ValueError, match="holds no images/train with masks/train"):
        open_source(f"masks:{tmp_path}")
    with pytest.raises(ValueError, match="names 3 folders"):
        open_source("masks:a:b:c", "all")
    write(tmp_path, "a", "images", "other")
    write(tmp_path, "b", "others", "masks")
    with pytest.raises(ValueError, match="no image in .* has a map in"):
        open_source(f"masks:{tmp_path}", "all")
    with pytest.raises(NoSplit, match="is not cut into train, val and test"):
        open_source(f"masks:{tmp_path}", "val")
