"""foveate eval from end to end."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import randomise, vit

import foveate
from foveate import machine
from foveate.cli import eval as command
from foveate.data import Inputs
from foveate.data.demo import demo_vit
from foveate.measure import Plan, Results, evaluate, one, select


def run(line: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(shlex.split(line)))


def test_everything_on_the_demo_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["foveate", "eval", "demo", "--limit", "30"])
    run(
        f"demo evit 'ats(K=20)' --rates .5 .7 --limit 30 --batch 16 --occlusion .5 .95 "
        f"--mask-seeds 2 --pruning .3 --statistics --speed 4 2 --rounds 2 --out {tmp_path}"
    )
    out = capsys.readouterr().out
    for words in (
        "Accuracy on 30 test images",
        "× dense, batch 4",
        "a trial, not a result",
        "dropped at random",
        "without training",
        "Tokens of an image",
        f"wrote    {tmp_path / 'eval.json'}",
    ):
        assert words in out
    report = Results.load(tmp_path / "eval.json")
    about, table = report.about, report.table
    assert about["command"] == "foveate eval demo --limit 30"
    assert about["settings"]["data"] == "fashion-mnist"
    assert about["settings"]["mask_seeds"] == [0, 1]
    assert about["machine"]["torch"] and set(table["machine"]) == {machine.name(about["machine"])}
    methods = ["", "evit(keep=0.5)", "evit(keep=0.7)", "ats(K=20)"]
    for part, wanted in (("accuracy", methods), ("speed", methods), ("tokens", methods[1:])):
        assert list(select(table, part=part)["method"].unique()) == wanted
    assert sorted(select(table, part="speed", metric="times")["at"]) == [2.0] * 4 + [4.0] * 4
    for method in methods:
        low, ratio, high = (
            one(table, name, part="speed", method=method, at=4) for name in ("low", "times", "high")
        )
        assert low <= ratio <= high
        assert one(table, "images", part="accuracy", method=method) == 30
    kept = select(table, part="occlusion", metric="kept")
    assert kept["value"].tolist() == [24, 2]
    assert set(select(table, part="occlusion", metric="top1")["draw"]) == {0, 1}
    for method in ("random", "attention"):
        own = select(table, part="pruning", method=method, metric="kept")
        assert own["value"].tolist() == [14, 4, 1]
    known = about["models"]["demo"]
    assert known["unreadable"] == 0 and known["inputs"]["size"] == [28, 28]
    shown = re.findall(r"^!\[.*\]\((.*)\)$", (tmp_path / "eval.md").read_text(), re.MULTILINE)
    assert len(shown) == 5 + 2 * 3 and all((tmp_path / name).is_file() for name in shown)


def test_the_shipped_images_give_the_known_accuracy() -> None:
    table = evaluate({"demo": demo_vit()}, Plan(data="fashion-mnist")).table
    assert one(table, "top1") == pytest.approx(84.65, abs=0.1)  # a near tie may fall either way
    assert one(table, "images") == 2000


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten classes of two pictures, one of which is broken."""
    rng = np.random.default_rng(0)
    for number in range(10):
        folder = tmp_path / "photos" / "val" / f"class{number}"
        folder.mkdir(parents=True)
        for copy in range(2):
            pixels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{copy}.png")
    (tmp_path / "photos" / "val" / "class3" / "1.png").write_bytes(b"nothing")
    return tmp_path / "photos"


def test_several_saved_models(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / place / "model" for place in ("full", "masked")]
    for number, folder in enumerate(folders):
        model = foveate.apply(randomise(vit(), number), "evit(keep=0.7)")
        foveate.save(model, folder, everything=True)
    run(
        f"{folders[0]} --models {folders[1]} --data {photos} --rates .5 --occlusion 0 .5 "
        f"--mask-seeds 1 --out {tmp_path / 'out'}"
    )
    report = Results.load(tmp_path / "out" / "eval.json")
    assert list(report.about["models"]) == ["full/model", "masked/model"]
    for label, about in report.about["models"].items():
        own = select(report.table, run=label)
        accuracy = select(own, part="accuracy")
        methods = ["", "evit(keep=0.7)", "evit(keep=0.5)"]
        assert list(accuracy["method"].unique()) == methods
        assert one(accuracy, "images", method="") == 19 and about["unreadable"] == 1
        whole = one(own, "top1", part="occlusion", at=0)
        assert whole == one(accuracy, "top1", method="evit(keep=0.7)")
        assert about["method"] == "evit(keep=0.7)"
    assert "full/model: 1 images could not be read" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1\.png"):
        run(f"{folders[0]} --data {photos} --strict")


def test_errors(photos: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    foveate.save(foveate.apply(randomise(vit()), "evit(keep=0.7)"), saved, everything=True)
    with pytest.raises(ValueError, match=r"nowhere/model.pth does not exist"):
        run("nowhere/model.pth")
    with pytest.raises(ValueError, match="say with --data what to evaluate on"):
        run(str(saved))
    with pytest.raises(ValueError, match="has its own method evit"):
        run(f"{saved} tome --data {photos}")
    with pytest.raises(ValueError, match="pruning without training is of plain models"):
        run(f"{saved} --data {photos} --pruning")
    with pytest.raises(ValueError, match="demo has no method, so there are no statistics"):
        run("demo --statistics")
    with pytest.raises(ValueError, match="the data set has 10 classes and the model 3 outputs"):
        evaluate({"x": vit(num_classes=3)}, Plan(data=str(photos)))
    with pytest.raises(ValueError, match=r"--val-share must lie between 0 and 1, got 3"):
        run("demo --split val --val-share 3")
    with pytest.raises(ValueError, match="apart from classifiers.*got demo, demo_detector"):
        run(f"demo --models demo_detector --data {photos}")
    with pytest.raises(ValueError, match="say with --data"):
        run("demo_detector")
    with pytest.raises(ValueError, match="each model once"):
        run("demo --models demo")
    with pytest.raises(ValueError, match="device must be auto, cpu"):
        run("demo --device tpu9x")
    with pytest.raises(ValueError, match="rounds must be a whole number from 1"):
        run("demo --rounds 0")
    with pytest.raises(ValueError, match=r"occlusion ratios must lie in \[0, 1\]"):
        run("demo --occlusion 1.5")
    with pytest.raises(ValueError, match="batch must be a whole number from 1"):
        run("demo --batch 0")


def test_wrong_options_are_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("foveate.measure.run.costs", fail)
    good, bad = demo_vit(), foveate.apply(demo_vit(), "evit(keep=0.7)")
    with pytest.raises(ValueError, match="b has its method"):
        evaluate({"a": good, "b": bad}, Plan(data="fashion-mnist", pruning=(0.5,)))
    with pytest.raises(ValueError, match="pruning rates must lie in"):
        Plan(data="fashion-mnist", pruning=(2.0,))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["demo"], ["demo"]),
        (["out/full", "out/masked.pt"], ["full", "masked.pt"]),
        (["a/run/model", "b/run/model"], ["a/run/model", "b/run/model"]),
        (["x/a/model", "x/b/model"], ["a/model", "b/model"]),
        (["a/best.pt", "best.pt"], ["a/best.pt", "best.pt"]),
    ],
)
def test_labels_are_unique_and_short(names: list[str], labels: list[str]) -> None:
    assert command._labels(names) == labels


def test_inputs_are_the_models_own() -> None:
    found = Inputs.of(demo_vit())
    assert (found.size, found.channels, found.mean, found.std) == ((28, 28), 1, (0.286,), (0.353,))
    model = vit()
    model.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.2,) * 3, "input_size": (3, 48, 48)}
    model.pretrained_cfg |= {"crop_pct": 0.9, "interpolation": "bilinear"}
    for given in (model, foveate.apply(model, "evit(keep=0.7)")):
        found = Inputs.of(given)
        assert found.size == (48, 48) and found.mean == (0.1,) * 3
        assert (found.crop_pct, found.interpolation) == (0.9, "bilinear")


def test_inputs_of_a_hugging_face_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from small import hf

    hf("ViTForImageClassification").save_pretrained(tmp_path)
    from foveate.backbones import from_folder

    assert Inputs.of(from_folder(tmp_path)).crop_pct == 1.0
    (tmp_path / "preprocessor_config.json").write_text(
        '{"do_center_crop": true, "crop_size": {"height": 48, "width": 48}, "resample": 2, '
        '"size": {"shortest_edge": 60}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}'
    )
    found = Inputs.of(from_folder(tmp_path))
    assert (found.crop_pct, found.interpolation, found.mean) == (0.8, "bilinear", (0.1, 0.2, 0.3))
