"""Training, validation and test images: where they come from, and that they share none."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from samples import Numbers, tree

from foveate.data import Splits, final_images, open_images, open_splits
from foveate.data import splits as module
from foveate.data.splits import common_images, divide


def classes(root: Path, count: int = 10, kinds: str = "abc") -> Path:
    """A folder of classes that is not cut into splits, every image another colour."""
    files = {
        f"{kind}/{i}.png": count * number + i + 1
        for number, kind in enumerate(kinds)
        for i in range(count)
    }
    assert count * len(kinds) < 256
    root.mkdir(parents=True, exist_ok=True)
    for name, number in files.items():
        tree(root, {name: number})
        path = root / name
        path.write_bytes(path.read_bytes() + bytes([number]))  # colours repeat
    return root


def names(splits: Splits, which: str) -> set[str]:
    source = getattr(splits, which)
    return {source.name(i) for i in range(len(source))}


# Division ----------------------------------------------------------------------------------------


def test_one_set_is_divided_by_content(tmp_path: Path) -> None:
    root = classes(tmp_path / "photos")
    found = open_splits(f"folder:{root}", share=0.2)
    assert (len(found.train) + len(found.val), found.test) == (30, None)
    held = names(found, "val")
    assert 2 <= len(held) <= 12 and not held & names(found, "train")
    assert found.train.classes == found.val.classes == ("a", "b", "c")
    assert (found.train.split, found.val.split, found.held_out) == ("train", "val", (0.2, 0))
    # The same images are held out whatever they are called and wherever they lie.
    moved = tmp_path / "elsewhere"
    for number, path in enumerate(sorted(root.glob("*/*.png"), reverse=True)):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        (moved / path.parent.name / f"{number}.png").write_bytes(path.read_bytes())
    again = open_splits(str(moved), share=0.2)
    contents = [
        {source.content(i) for i in range(len(source))} for source in (found.val, again.val)
    ]
    assert contents[0] == contents[1]
    # Nor does it matter which images are there besides, and whether they have labels.
    shutil.rmtree(moved / "a")
    fewer = open_splits(str(moved), share=0.2, labels=False).val
    assert {fewer.content(i) for i in range(len(fewer))} < contents[0]
    other = open_splits(str(root), share=0.2, seed=1)
    assert names(other, "val") != held
    assert open_images(str(root), "val", share=0.2).name(0) in held


def test_copies_stay_together_and_no_side_is_empty() -> None:
    class Copies(Numbers):
        def image(self, index: int) -> np.ndarray:  # ten different images, each four times
            return np.full((4, 4, 1), index % 10, dtype=np.uint8)

    kept, out = divide(Copies(count=40), 0.25, 0)
    assert not {i % 10 for i in kept.tolist()} & {i % 10 for i in out.tolist()}
    assert len(kept) + len(out) == 40 and len(out)
    for share, least, most in ((1e-9, 1, 1), (0.5, 10, 30), (1 - 1e-9, 39, 39)):
        kept, out = divide(Numbers(count=40), share, 0)
        assert least <= len(out) <= most and len(kept) + len(out) == 40
        wider = divide(Numbers(count=40), min(1.0, 1.5 * share), 0)[1]
        assert set(out.tolist()) <= set(wider.tolist())
    with pytest.raises(ValueError, match="numbers has 1 image: to divide it into training and val"):
        divide(Numbers(count=1), 0.5, 0)


def test_a_set_with_test_images_holds_validation_out_of_the_others() -> None:
    found = open_splits("fashion-mnist", share=0.2)
    assert [len(s) for s in (found.train, found.val, found.test) if s] == [2433, 567, 2000]
    assert min(np.bincount([found.val.label(i) for i in range(567)])) > 40
    assert found.facts() == {
        "train": {"data": "fashion-mnist", "split": "train", "images": 2433},
        "val": {
            "data": "fashion-mnist",
            "split": "val",
            "images": 567,
            "held_out_of": "fashion-mnist",
            "share": 0.2,
            "seed": 0,
        },
        "test": {"data": "fashion-mnist", "split": "test", "images": 2000},
        "in_both": {
            "training and validation": {"images": 0, "compared": 567},
            "training and test": {"images": 0, "compared": 2000},
            "validation and test": {"images": 0, "compared": 2000},
        },
    }
    assert found.sentence() == (
        "2433 training images of fashion-mnist; 567 for validation, held out of them by content "
        "(share 0.2, seed 0); 2000 test images"
    )
    same = pickle.loads(pickle.dumps(found.val))  # as it goes to worker processes
    assert [same.name(i) for i in range(3)] == [found.val.name(i) for i in range(3)]
    bare = open_splits("fashion-mnist", "none")
    assert (len(bare.train), bare.val, bare.test) == (3000, None, None)


def test_sets_that_are_cut_keep_their_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        tree(tmp_path, {f"{split}/a/1.png": 10 * number + 1, f"{split}/b/2.png": 10 * number + 2})
    found = open_splits(f"folder:{tmp_path}")
    assert [s.split for s in (found.train, found.val, found.test) if s] == ["train", "val", "test"]
    assert found.held_out is None and len(found.val) == 2
    assert found.sentence().endswith(f"2 for validation of folder:{tmp_path} (val); 2 test images")


def test_sets_of_their_own(tmp_path: Path) -> None:
    """A set that is named for validation is taken whole, and the training images too."""
    mine, its = classes(tmp_path / "mine", 4), classes(tmp_path / "its", 3)
    for path in its.glob("*/*.png"):
        path.write_bytes(path.read_bytes() + b"other")
    found = open_splits(str(mine), str(its))
    assert (len(found.train), len(found.val), found.held_out) == (12, 9, None)
    judged = open_splits(str(mine), test=str(its), share=0.25)
    assert len(judged.train) + len(judged.val) == 12 and len(judged.test) == 9


# Images in two splits ----------------------------------------------------------------------------


def test_the_same_images_twice_are_refused(tmp_path: Path) -> None:
    root = classes(tmp_path / "photos")
    (tmp_path / "link").symlink_to(root)
    for other in (str(root), f"folder:{root}", str(tmp_path / "link"), f"{root}/."):
        with pytest.raises(ValueError, match=r"data.train and data.val name the same images"):
            open_splits(f"folder:{root}", other)
    with pytest.raises(ValueError, match=r"one lies inside the other"):
        open_splits(str(tmp_path), str(root))
    with pytest.raises(ValueError, match=r"data.val and data.test name the same images"):
        open_splits("fashion-mnist", str(root), f"folder:{root}")


def test_images_of_two_splits_are_counted_and_refused(tmp_path: Path) -> None:
    root = classes(tmp_path, 4)
    for path in sorted(root.glob("*/*.png")):
        for split in ("train", "val") if path.name in ("0.png", "1.png") else ("train",):
            (root / split / path.parent.name).mkdir(parents=True, exist_ok=True)
            (root / split / path.parent.name / f"{split}-{path.name}").write_bytes(
                path.read_bytes()
            )
    for kind in "abc":
        (root / kind).rename(tmp_path.parent / f"{tmp_path.name}-{kind}")
    message = r"6 of 6 validation images are training images too, such as .*val-0.png, which is .*"
    with pytest.raises(ValueError, match=message + r"train-0.png: .* with data.overlap=6") as error:
        open_splits(str(root))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="data.overlap=6"):
        open_splits(str(root), allowed=5)
    found = open_splits(str(root), allowed=6)
    assert found.common == {"training and validation": (6, 6)}


def test_a_part_of_very_large_sets_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Numbers(count=64, per_class=16), Numbers(count=64, per_class=16)
    assert common_images(one, other) == ([(i, i) for i in range(64)], 64)
    monkeypatch.setattr(module, "_MOST_BYTES", 64 * 16 + 8 * 16)
    pairs, compared = common_images(one, other)
    assert compared == 8 and pairs == [(i, i) for i in range(0, 64, 8)]
    other.count = 20
    monkeypatch.setattr(Numbers, "sizes", lambda self: None)
    assert len(common_images(one, other)[0]) == 20
    monkeypatch.setattr(module, "_MOST_UNSIZED", 10)
    assert common_images(one, other) == ([], 0)


def test_classes_that_do_not_belong_together(tmp_path: Path) -> None:
    mine, its = classes(tmp_path / "mine", 4), classes(tmp_path / "its", 3, "xy")
    message = (
        "the validation images of .*its have the class x, which no training image of .*mine has"
    )
    with pytest.raises(ValueError, match=message):
        open_splits(str(mine), str(its))
    for share in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {share}"):
            open_splits(str(mine), share=share)


# The last look -----------------------------------------------------------------------------------


def test_what_a_model_is_judged_by(tmp_path: Path) -> None:
    root = classes(tmp_path / "photos", 5)
    assert final_images("fashion-mnist", None, None) == ("fashion-mnist", "test")
    assert final_images(str(root), None, None) == (str(root), "val")
    assert final_images(str(root), "other", None) == ("other", None)
    assert final_images("fashion-mnist", "other", "last") == ("last", None)
    assert open_images("fashion-mnist").split == "test"
    assert open_images(str(root)).split == "all" and len(open_images(str(root))) == 15
    held = open_images(str(root), "val", share=0.2)
    assert 1 <= len(held) < 10 and held.split == "val"
    with pytest.raises(ValueError, match="no split 'test'"):
        open_images(str(root), "test")
