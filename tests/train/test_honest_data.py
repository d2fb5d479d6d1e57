"""Nothing is validated on what it was trained on, and the run says where its images come from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import DATA, finetune, run, watched

from foveate.data import open_splits
from foveate.train.splits import open_data


def noise(root: Path, count: int, kinds: str = "ab") -> Path:
    """Random pixels in classes that mean nothing, in one folder without splits."""
    random = np.random.default_rng(0)
    for number in range(count):
        folder = root / kinds[number % len(kinds)]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_random_images_are_learnt_by_heart_and_validated_at_chance(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One folder for both, as people have it: a model that knows every training image by heart."""
    root = noise(tmp_path / "photos", 96)
    data = {**DATA, "train": f"folder:{root}", "val_share": 0.5, "augment": {"crop": "none"}}
    data |= {"batch": 16, "limit": None, "val_limit": None}
    data["augment"]["flip"] = 0.0
    recipe = finetune("loop.epochs=60", "loop.check_every=60", "optim.lr=0.004", data=data)
    with watched() as losses, caplog.at_level(logging.INFO, "foveate"):
        result = run(recipe, tmp_path / "run")
    assert np.mean(losses[-4:]) < 0.2  # chance is 0.69
    assert 30 < result["accuracy"] < 70
    splits = open_splits(str(root), share=0.5)
    assert result["images"]["train"] == len(splits.train)
    assert result["splits"] == {
        "train": {"data": f"folder:{root}", "split": "train", "images": len(splits.train)},
        "val": {
            **{"data": f"folder:{root}", "split": "val", "images": len(splits.val)},
            **{"held_out_of": f"folder:{root}", "share": 0.5, "seed": 0},
        },
        "in_both": {"training and validation": {"images": 0, "compared": len(splits.val)}},
    }
    assert result["splits"] == json.loads((tmp_path / "run/result.json").read_text())["splits"]
    assert "held out of them by content (share 0.5, seed 0); no test images" in caplog.text


def test_what_cannot_be_divided_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = noise(tmp_path / "one", 20, "a")
    with pytest.raises(ValueError, match="has the class a alone: two are needed at least"):
        open_data(finetune(f"data.train=folder:{one}").data)
    single = noise(tmp_path / "single", 1, "a")
    with pytest.raises(ValueError, match="has the class a alone: two are needed at least"):
        open_data(finetune(f"data.train=folder:{single}").data)
    with pytest.raises(ValueError, match="has 1 image: to divide it into training and validation"):
        open_data(finetune(f"data.train=folder:{single}").data, labels=False)
    with pytest.raises(ValueError, match="data.val=none is for pre-training"):
        open_data(finetune("data.val=none").data)
    with pytest.raises(ValueError, match="data.train and data.val name the same images"):
        open_data(finetune("data.val=fashion-mnist").data)
    few = noise(tmp_path / "few", 6, "abcdef")
    with caplog.at_level(logging.WARNING, "foveate"):
        open_data(finetune(f"data.train=folder:{few}", "data.val_share=0.5").data)
    assert "leaves no training image of " in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.val_share=0", "data.val_share must lie between 0 and 1, got 0.0"),
        ("data.val_share=1", "data.val_share must lie between 0 and 1, got 1.0"),
        ("data.split_seed=-1", "data.split_seed must be at least 0, got -1"),
        ("data.overlap=-1", "data.overlap must be at least 0, got -1"),
    ],
)
def test_settings_of_the_division(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(setting)


def test_a_run_that_fails_leaves_no_empty_folder(tmp_path: Path) -> None:
    out, before = tmp_path / "new", tmp_path / "there"
    before.mkdir()
    for folder in (out, before):
        with pytest.raises(ValueError, match="name the same images"):
            run(finetune("data.val=fashion-mnist"), folder)
    assert not out.exists() and before.is_dir()


def test_a_warm_up_longer_than_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "foveate"):
        run(finetune("optim.warmup_epochs=5", "loop.max_steps=1"), tmp_path / "long")
    said = (
        "optim.warmup_epochs=5 is longer than loop.epochs=2: the warm-up takes 2 of its 8 updates"
    )
    assert said in caplog.text


def test_a_start_that_has_seen_the_held_out_images(tmp_path: Path) -> None:
    """However much of the same set it held out itself; another set is another matter."""
    start = tmp_path / "start"
    run(finetune("loop.max_steps=1"), start)
    paths = [start, start / "model.safetensors"]
    for name in ("snapshots", "best"):
        (start / name).mkdir(exist_ok=True)
        paths.append(Path(shutil.copy(start / "model.safetensors", start / name)))
    for path in paths:
        with pytest.raises(
            ValueError, match=r"has data.val_share=0.1 and this run 0.3, on the same"
        ):
            run(finetune("data.val_share=0.3", model={"start": str(path)}), tmp_path / "run")
    with pytest.raises(ValueError, match="has data.split_seed=0 and this run 1"):
        run(finetune("data.split_seed=1", model={"start": str(start)}), tmp_path / "run")
    photos = noise(tmp_path / "photos", 40)
    other = finetune(
        *(f"data.train=folder:{photos}", "data.val_share=0.3", "loop.max_steps=1"),
        *("model.new_head=true", "data.limit=null", "data.val_limit=null"),
        model={"start": str(start)},
    )
    run(other, tmp_path / "other")
    judged = finetune(
        f"data.train=folder:{noise(tmp_path / 'more', 30)}",
        f"data.val=folder:{photos}",
        model={"start": str(tmp_path / "other")},
    )
    with pytest.raises(ValueError, match="trains on .*photos, which is data.val of this run"):
        run(judged, tmp_path / "judged")
