"""Any data set from one string: what is found, and one sentence for what is wrong."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from samples import png, red, tree

from foveate.data import CLASSES, NoSplit, fashion_mnist_mini, open_first, open_source

# The specification -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foldr:x", "unknown data set 'foldr'; did you mean 'folder'"),
        ("fashion-mnits", "did you mean 'fashion-mnist'"),
        ("", "the data '' do not exist"),
        ("/nowhere/at/all", "the data '/nowhere/at/all' do not exist; kinds of data are"),
        ("./nowhere:x", r"the data './nowhere:x' do not exist"),
        ("folder", "'folder' names no place: folder:PATH"),
        ("shards:", "'shards:' names no place"),
        ("fashion-mnist:", "names no place"),
        ("fashion-mnist:/nowhere", "holds no train-images"),
    ],
)
def test_wrong_specifications(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_source(spec)
    assert "\n" not in str(error.value)


def test_wrong_splits() -> None:
    with pytest.raises(ValueError, match="one of 'train', 'val', 'test', 'all'; got 'dev'"):
        open_source("fashion-mnist", "dev")
    for split in ("val", "all"):
        with pytest.raises(NoSplit, match=f"has the splits train and test, and no {split}"):
            open_source("fashion-mnist", split)


def test_fashion_mnist() -> None:
    train, test = open_source("fashion-mnist"), open_source("fashion-mnist", "test")
    assert (len(train), len(test), train.channels, train.classes) == (3000, 2000, 1, CLASSES)
    images, labels = fashion_mnist_mini("test")
    assert np.array_equal(test.image(7), images[7].permute(1, 2, 0).numpy())
    assert [test.label(i) for i in range(2000)] == labels.tolist()
    assert test.content(7) == images[7].numpy().tobytes() and test.sizes()[7] == 28 * 28
    assert train.name(17) == "fashion-mnist train 17"
    bare = open_source("fashion-mnist", labels=False)
    assert bare.classes is None and bare.label(3) == -1


# Folders -----------------------------------------------------------------------------------------

TWO_SPLITS = {
    "train/b/1.png": 1,
    "train/a/x/2.png": 2,
    "train/a/3.jpg": 3,
    "train/c/4.png": 4,
}


@pytest.mark.parametrize("val", ["val", "validation", "valid", "dev"])
@pytest.mark.parametrize("prefix", ["folder:", ""])
def test_a_folder_with_splits(val: str, prefix: str, tmp_path: Path) -> None:
    tree(tmp_path, {**TWO_SPLITS, f"{val}/c/5.png": 5, f"{val}/b/6.png": 6})
    train = open_source(f"{prefix}{tmp_path}")
    assert train.classes == ("a", "b", "c") and train.channels == 3
    found = sorted((red(train, i), train.label(i)) for i in range(len(train)))
    assert found == [(1, 1), (2, 0), (3, 0), (4, 2)]
    assert train.name(0).endswith("train/a/3.jpg")
    held_out = open_source(f"{prefix}{tmp_path}", "val")
    # Class "a" has no image here, and "b" and "c" keep their numbers.
    assert held_out.classes == train.classes
    assert [(red(held_out, i), held_out.label(i)) for i in range(2)] == [(6, 1), (5, 2)]
    same = pickle.loads(pickle.dumps(train))
    assert [same.name(i) for i in range(4)] == [train.name(i) for i in range(4)]


def test_a_folder_of_three_splits(tmp_path: Path) -> None:
    tree(tmp_path, {"train/a/1.png": 1, "test/a/2.png": 2, "val/a/3.png": 3})
    for number, split in enumerate(("train", "test", "val"), start=1):
        assert red(open_source(f"folder:{tmp_path}", split), 0) == number


def test_a_folder_of_classes_is_one_set(tmp_path: Path) -> None:
    tree(tmp_path, {"dog/1.png": 1, "cat/2.png": 2, "train/3.png": 3})
    source = open_source(str(tmp_path), "all")
    assert source.classes == ("cat", "dog", "train") and source.split == "all"
    assert [red(source, i) for i in range(3)] == [2, 1, 3]
    for split in ("train", "val", "test"):
        with pytest.raises(NoSplit, match=f"is not cut .* no split '{split}': all its images are"):
            open_source(str(tmp_path), split)
    assert open_first(str(tmp_path), ("test", "val", "all")).split == "all"
    with pytest.raises(NoSplit, match="no split 'test'"):  # the first that was wanted
        open_first(str(tmp_path), ("test", "val"))


def test_folders_without_labels(tmp_path: Path) -> None:
    flat = open_source(f"folder:{tree(tmp_path / 'flat', {'1.png': 1, 'deep/2.png': 2})}", "all")
    assert flat.classes == ("deep",) and len(flat) == 1
    flat = open_source(f"folder:{tmp_path / 'flat'}", "all", labels=False)
    assert flat.classes is None and [flat.label(i) for i in range(len(flat))] == [-1, -1]
    tree(tmp_path / "cut", {"train/1.png": 1, "val/2.png": 2})
    assert red(open_source(f"folder:{tmp_path / 'cut'}", "val", labels=False), 0) == 2


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (None, "train", "data does not exist; a folder of images is needed"),
        ({}, "all", r"holds no images"),
        ({"1.png": 1, "2.png": 2}, "all", "holds 2 images and no subfolders: labels come"),
        (TWO_SPLITS, "val", "holds train and no folder val or validation .* split 'val'"),
        (TWO_SPLITS, "all", "holds train and no folder all for the split 'all'"),
        ({"val/a/1.png": 1}, "train", "holds val and no folder train for the split 'train'"),
        (
            {**TWO_SPLITS, "val/a/1.png": 1, "val/d/2.png": 2, "val/e/3.png": 3},
            "val",
            r"val has classes that .*train has not: 'd', 'e'",
        ),
    ],
)
def test_folders_that_are_wrong(
    files: dict | None, split: str, message: str, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    if files is not None:
        root.mkdir()
        tree(root, files)
    with pytest.raises(ValueError, match=message) as error:
        open_source(f"folder:{root}", split)
    assert "\n" not in str(error.value)


def test_a_class_without_images_and_a_file_for_a_folder(tmp_path: Path) -> None:
    tree(tmp_path, TWO_SPLITS)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images"):
        open_source(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=r"1\.png is a file; a folder of images is needed"):
        open_source(f"folder:{tmp_path / 'train/b/1.png'}")


def test_images_beside_class_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree(tmp_path, {**TWO_SPLITS, "train/loose.png": 9})
    assert len(open_source(f"folder:{tmp_path}")) == 4
    assert "1 images beside the class folders are left out" in caplog.text


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    tree(tmp_path, TWO_SPLITS)
    (tmp_path / "train/a/3.jpg").write_text("text")
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=r"train/a/3\.jpg: not an image"):
        source.image(0)
    assert source.label(0) == 0


# torchvision -------------------------------------------------------------------------------------


def cifar(root: Path) -> str:
    """CIFAR-10's files with a few images, and checksums that are not looked at."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        pixels = np.full((2, 3072), 10 * i, dtype=np.uint8)
        pixels[:, :1024] += 5  # red
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i, 9 - i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return f"torchvision:CIFAR10:{root}"


def test_torchvision_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    spec = cifar(tmp_path)
    train, test = open_source(spec), open_source(spec, "test")
    assert (len(train), len(test), train.channels) == (10, 2, 3)
    assert train.classes == tuple("abcdefghij") and train.label(3) == 8
    image = np.asarray(test.image(0))
    with pytest.raises(NoSplit, match="torchvision's CIFAR10 has no split 'val'"):
        open_source(spec, "val")
    assert image.shape == (32, 32, 3) and image[0, 0].tolist() == [55, 50, 50]
    assert train.name(4) == f"{spec} train 4"


def test_torchvision_image_by_image(tmp_path: Path) -> None:
    """A set that is cut by ``split``, and whose images are files."""
    names = {"train": 3, "val": 2}
    root = tmp_path / "imagenette2"
    for split, count in names.items():
        for wnid in torchvision.datasets.Imagenette._WNID_TO_CLASS:
            tree(root / split / wnid, {f"{i}.JPEG": i for i in range(count)})
    spec = f"torchvision:Imagenette:{tmp_path}"
    val = open_source(spec, "val")
    assert len(val) == 20 and val.label(2) == 1 and red(val, 3) == 1
    assert val.sizes() is None and val.content(3) == val.content(1) != val.content(0)
    with pytest.raises(NoSplit, match="torchvision's Imagenette has no split 'test'"):
        open_source(spec, "test")
    assert val.classes is not None and val.classes[0] == "tench" and len(val.classes) == 10
    next((root / "train").iterdir()).joinpath("0.JPEG").write_bytes(b"text")
    train = open_source(spec)
    damaged = 0
    for i in range(len(train)):
        try:
            train.image(i)
        except ValueError as error:
            damaged += 1
            assert str(error).startswith(f"{spec} train {i}: ")
    assert damaged == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:CIFAR10", "names no folder: it is torchvision:NAME:FOLDER"),
        ("torchvision:CIFAR11:x", "unknown data set of torchvision 'CIFAR11'; did you mean"),
        ("torchvision:CIFAR10:/nowhere", "CIFAR10 cannot be read from /nowhere: Dataset not found"),
        ("torchvision:SVHN:/nowhere", "SVHN cannot be read from /nowhere: Dataset not found"),
        ("torchvision:FakeData:/nowhere", "FakeData is not cut into training and validation"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_errors(spec: str, message: str, split: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_source(spec, split)
    assert "\n" not in str(error.value)


# Hugging Face ------------------------------------------------------------------------------------


def rows(numbers: list[int]):  # noqa: ANN201
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "fine": datasets.ClassLabel(names=["a", "b", "c"]),
            "coarse": datasets.Value("int64"),
        }
    )
    columns = {
        "picture": [{"bytes": png(n), "path": None} for n in numbers],
        "fine": [n % 3 for n in numbers],
        "coarse": [n % 2 for n in numbers],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    both = datasets.DatasetDict({"train": rows([1, 2, 3, 4]), "test": rows([5, 6])})
    both.save_to_disk(str(tmp_path / "both"))
    return tmp_path / "both"


def test_hf(saved: Path) -> None:
    train, test = open_source(f"hf:{saved}"), open_source(f"hf:{saved}", "test")
    assert (len(train), len(test), train.classes) == (4, 2, ("a", "b", "c"))
    assert [red(test, i) for i in range(2)] == [5, 6]
    assert [test.label(i) for i in range(2)] == [2, 0]
    assert test.name(1) == f"hf:{saved} test 1"
    assert test.content(0) == png(5) and test.sizes() is None
    assert red(pickle.loads(pickle.dumps(train)), 2) == 3
    coarse = open_source(f"hf:{saved}[label=coarse, image=picture]")
    assert coarse.classes == ("0", "1") and coarse.label(0) == 1
    assert open_source(f"hf:{saved}", labels=False).label(0) == -1


def test_hf_of_one_split_and_of_plain_files(saved: Path, tmp_path: Path) -> None:
    rows([7, 8]).save_to_disk(str(tmp_path / "one"))
    assert red(open_source(f"hf:{tmp_path / 'one'}", "all"), 1) == 8
    with pytest.raises(NoSplit, match="was saved as one set, so there is no split 'train'"):
        open_source(f"hf:{tmp_path / 'one'}")
    tree(tmp_path / "files", {"train/x/1.png": 1, "train/y/2.png": 2, "validation/y/3.png": 3})
    val = open_source(f"hf:{tmp_path / 'files'}", "val")
    assert (red(val, 0), val.label(0), val.classes) == (3, 1, ("x", "y"))


def test_hf_errors(saved: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = rows([1, 2])
    one.rename_column("fine", "kind").cast_column(
        "coarse", datasets.ClassLabel(num_classes=2)
    ).save_to_disk(str(tmp_path / "twice"))
    one.remove_columns("picture").save_to_disk(str(tmp_path / "none"))
    unlabelled = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"text", "path": None}, None], "label": [-1, -1]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
        ),
    )
    unlabelled.save_to_disk(str(tmp_path / "unlabelled"))
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "train_only"))
    for place, message in (
        ("twice", r"has 2 columns \(kind, coarse\) of the type ClassLabel .*twice\[label=COLUMN\]"),
        ("none", r"has no column of the type Image among fine, coarse: name one"),
        ("both[label=fien]", "unknown column 'fien'; did you mean 'fine'"),
        ("both[column=fine]", "unknown column 'column'"),
        ("both[fine]", "cannot read 'fine' in .*: columns go as label=COLUMN"),
        ("unlabelled", "has 2 of 2 images without a label"),
        ("missing", "hf:.*missing cannot be opened: "),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_source(
                f"hf:{tmp_path / place}", "train" if place[:4] in ("both", "miss") else "all"
            )
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has the splits train; needed is val or validation"):
        open_source(f"hf:{tmp_path / 'train_only'}", "val")
    source = open_source(f"hf:{tmp_path / 'unlabelled'}", "all", labels=False)
    with pytest.raises(ValueError, match="unlabelled all 0: not an image"):
        source.image(0)
    with pytest.raises(ValueError, match="all 1: there is no image in the column 'image'"):
        source.image(1)


def test_hf_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:some/set needs a package: pip install 'foveate\[dat"):
        open_source("hf:some/set")
