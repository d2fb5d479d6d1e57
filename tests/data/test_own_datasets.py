"""Data sets of one's own: their labels, their transforms, and what is a mistake of theirs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from foveate.data import DatasetSource, Loader, open_splits


class Numbered:
    """Pictures of one grey each; ``change`` is done to an item as it is read."""

    classes = ("a", "b", "c", "d")

    def __init__(self, count: int = 12, change: Any = None) -> None:
        self.targets, self.change, self.read = [i % 4 for i in range(count)], change, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        item = Image.new("L", (8, 8), index), self.targets[index]
        return item if self.change is None else self.change(*item)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        for image in range(3):
            colour = (40 * number, 40 * image, 0)
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{image}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "classes"),
    [
        (None, ("a", "b", "c", "d")),
        (lambda label: label // 2, ("0", "1")),
        (lambda label: torch.tensor(3 - label), ("0", "1", "2", "3")),
        (lambda label: label, ("a", "b", "c", "d")),
    ],
    ids=range(4),
)
def test_labels_are_those_of_the_items(change: Any, classes: tuple[str, ...], folder: Path) -> None:
    dataset = ImageFolder(folder, target_transform=change)
    source = DatasetSource(dataset, "all")
    assert [source.label(i) for i in range(12)] == [int(dataset[i][1]) for i in range(12)]
    assert source.classes == classes


def test_labels_that_the_items_do_not_bear_out() -> None:
    source = DatasetSource(Numbered(change=lambda image, label: (image, label % 2)), "all")
    assert [source.label(i) for i in range(12)] == [0, 1] * 6 and source.classes == ("0", "1")
    stated = Numbered(count=400)
    source = DatasetSource(stated, "all")
    assert source.classes == stated.classes and stated.read < 20  # the others are not read


def odd(item: Any, count: int, at: int = 17) -> Numbered:
    """A data set that is sound but for one item, where nobody looks before it is trained on."""

    def change(image: Image.Image, label: int) -> Any:
        return item if image.getpixel((0, 0)) == at else (image, label)

    return Numbered(count, change)


GREY = Image.new("L", (8, 8))


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (GREY, "has no label, though the first item has one"),
        ({"image": GREY}, "has no label, though the first item has one"),
        ((GREY, None), "has the label None: a whole number is needed"),
        ((GREY, 1.5), "has the label 1.5: a whole number is needed"),
        ((GREY, 4), "has the label 4: the data set has the classes 0..3"),
        ((GREY, -1), "has the label -1: the data set has the classes 0..3"),
        (
            (np.zeros((3, 8, 8), np.uint8), 1),
            r"gives an array of uint8 \[3, 8, 8\]: an image is ui",
        ),
        ((np.zeros((8, 8, 3)), 1), r"gives an array of float64 \[8, 8, 3\]: an image is uint8"),
        ((torch.zeros(8, 8), 1), r"gives \[8, 8\]: an image of Pillow, a uint8 array"),
        (("cat.jpg", 1), "gives str: an image of Pillow, a uint8 array"),
        ((), "gives tuple: an image of Pillow, a uint8 array"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_one_item_that_is_not_like_the_others(item: Any, said: str, workers: int) -> None:
    """Whether it stands first, where all labels are read, or late in a set that states them."""
    late = DatasetSource(odd(item, 400), "all")
    loader = Loader(late, lambda sample: sample, batch=20, train=False, workers=workers)
    with pytest.raises(ValueError, match=f"^item 17 of Numbered .400 items. {said}"):
        list(loader)
    if workers:
        return
    unstated = odd(item, 20)
    unstated.targets = [str(one) for one in unstated.targets]
    unstated.change = lambda image, label: odd(item, 20).change(image, int(label))
    if "classes 0..3" not in said:
        with pytest.raises(ValueError, match=f"^item 17 of Numbered .20 items. {said}"):
            DatasetSource(unstated, "all")


def test_a_first_item_without_a_label() -> None:
    with pytest.raises(ValueError, match="has no labels, which this job needs"):
        open_splits(Numbered(change=lambda image, _: image))
    channels_first = Numbered(change=lambda *_: (np.zeros((3, 8, 8), np.uint8), 0))
    with pytest.raises(ValueError, match=r"^item 0 of Numbered .* uint8, \[H, W\] or \[H, W, C\]"):
        open_splits(channels_first)


@pytest.mark.parametrize("target", ["cat", None, [1.5], torch.zeros(3), {"boxes": 1}])
def test_without_labels_targets_are_not_touched(target: Any) -> None:
    dataset = Numbered(change=lambda image, _: (image, target))
    splits = open_splits(dataset, share=0.5, labels=False)
    assert splits.train.classes is None and set(splits.train.sample(0)) == {"image"}
    triple = [(Image.new("L", (8, 8), i), "cat", 1) for i in range(4)]
    assert set(DatasetSource(triple, "all", labels=False).sample(3)) == {"image"}


@pytest.mark.parametrize(
    ("transform", "warns"),
    [
        (v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage()]), True),
        (lambda image: np.asarray(image) + np.random.randint(2, dtype=np.uint8), True),
        (v2.ToImage(), False),
        (None, False),
    ],
    ids=range(4),
)
def test_a_training_transform_in_validation(
    transform: Any, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Set(Numbered):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            image.putpixel((0, 0), 255)  # else a flip would not show
            return (image if transform is None else transform(image)), label

    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "foveate"):
        open_splits(Set(), share=0.5)
        assert ("changes its images at random" in caplog.text) is warns
        assert caplog.text.count("give data.val a set of its own") == warns
        caplog.clear()
        if transform is None:
            open_splits(Set(), Numbered())
            assert not caplog.text
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_is_no_unreadable_image(workers: int) -> None:
    """Only what decoders and the file system raise is skipped."""

    def read(error: Exception) -> list[str]:
        def change(image: Image.Image, label: int) -> Any:
            if image.getpixel((0, 0)) == 5:
                raise error
            return torch.zeros(1, 8, 8), label

        loader = Loader(
            DatasetSource(Numbered(change=change), "all"),
            lambda sample: sample,
            batch=4,
            train=False,
            workers=workers,
        )
        return [name for batch in loader for name in batch["unreadable"]]

    assert len(read(OSError("image file is truncated"))) == 1
    assert len(read(Image.DecompressionBombError("too large"))) == 1
    with pytest.raises(ValueError, match="shapes do not match"):
        read(ValueError("shapes do not match"))


@pytest.mark.parametrize(("key", "what"), [("boxes", "objects"), ("semantic", "pixels")])
def test_objects_and_pixels_of_a_data_set(key: str, what: str) -> None:
    """Its own names of classes count; without any a job that needs them says so."""

    class Set:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": Image.new("RGB", (8, 8), (index, 0, 0)), key: torch.zeros(1, 4)}

    with pytest.raises(ValueError, match="has no labels, which this job needs"):
        open_splits(Set(), labels_of=what)
    Set.classes = ["cat", "cup"]  # type: ignore[attr-defined]
    splits = open_splits(Set(), labels_of=what)
    assert splits.train.classes == ("cat", "cup") and splits.train.labels_of == (what,)
    assert splits.train.pixel_classes == (("cat", "cup") if what == "pixels" else None)
    assert splits.val is not None and key in splits.val.sample(0)
    with pytest.raises(ValueError, match=f"has labels of {what}; this job needs labels of whole"):
        open_splits(Set())


def test_an_error_of_the_data_sets_own_code_names_the_item() -> None:
    class Broken(Numbered):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index) if index < 2 else {}["path"]

    source = DatasetSource(Broken(), "train", labels=False)
    assert source.image(1) is not None
    with pytest.raises(ValueError, match="item 2 of Broken.* cannot be read: KeyError: 'path'"):
        source.image(2)
