"""Cards of saved models: what they say, that it is true, and that nobody's own card is lost."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from small import eva, hf, images, randomise, vit
from torch import nn

import foveate
from foveate.convert import open_base
from foveate.convert.card import is_generated
from foveate.convert.record import read_record, write_record
from foveate.dense import make_dense

PYRAMID = {"name": "pyramid", "channels": 8}


def card(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def segmenter() -> nn.Module:
    model = make_dense(randomise(vit()), ["sky", "sea"], PYRAMID, {"name": "fpn"}, (48, 96))
    return foveate.apply(model, "evit(keep=0.7)")


def test_a_card_says_what_was_counted_and_that_nothing_was_measured(tmp_path: Path) -> None:
    model = foveate.apply(timm.create_model("deit_tiny_patch16_224"), "evit(keep=0.7)")
    foveate.save(model, tmp_path / "mine", everything=True)
    found, counted = card(tmp_path / "mine"), foveate.count(model)
    data = found.data.to_dict()
    assert data == {
        "library_name": "foveate",
        "pipeline_tag": "image-classification",
        "tags": ["foveate", "vision-transformer", "token-reduction", "evit"],
    }
    assert found.text.startswith("\n# mine\n")
    assert f"| {' '.join(map(str, counted.tokens))} (the same for every image) |" in found.text
    assert f"{counted.macs / 1e6:.2f} million, {counted.ratio:.0%} of the" in found.text
    assert f"{counted.parameters:,}, of which 0 are the method's" in found.text
    prepared = "RGB, 224 x 224 pixels; resized (bicubic) to 248, then cropped to the middle"
    assert prepared in found.text
    assert "| accuracy | not measured | |\n| speed | not measured | |" in found.text


@pytest.mark.parametrize(
    ("make", "task", "words"),
    [
        pytest.param(
            lambda: foveate.apply(randomise(vit(num_classes=0)), "tome(r=3)"),
            "image-feature-extraction",
            ("without a head", "forward_features", "quality of the features | not measured"),
            id="headless",
        ),
        pytest.param(
            lambda: foveate.apply(randomise(vit()), "ats(K=9)"),
            "image-classification",
            ("(expected or largest numbers: they differ from image", "depends on the image"),
            id="a count per image",
        ),
        pytest.param(
            lambda: foveate.apply(randomise(vit()), "ats(K=9, blocks=[1]) + tome(r=2, blocks=[2])"),
            "image-classification",
            ("depend on the image, so nothing was counted",),
            id="a count that only images tell",
        ),
        pytest.param(
            lambda: foveate.apply(
                randomise(vit()), "evit(keep=0.8, blocks=[1]) + tome(r=2, blocks=[3])"
            ),
            "image-classification",
            ("`evit(keep=0.8",),
            id="chain",
        ),
        pytest.param(
            lambda: foveate.apply(hf("ViTForImageClassification"), "evit"),
            "image-classification",
            ("ViTForImageClassification",),
            id="transformers",
        ),
        pytest.param(
            segmenter,
            "image-segmentation",
            ("segmenter of 2 classes (`fpn`", "shorter side 48", "2: sky, sea", "mean IoU | not"),
            id="segmenter",
        ),
        pytest.param(
            lambda: foveate.unwrap(open_base("demo_detector")),
            "object-detection",
            (
                *("detector of 10 classes (`mask_rcnn`", "that uses all tokens", "left out: "),
                "average precision | not",
            ),
            id="detector without a method",
        ),
    ],
)
def test_every_kind_of_model_has_a_card(
    make: Any, task: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    foveate.save(make(), tmp_path)
    found = card(tmp_path)
    assert found.data.pipeline_tag == task
    for word in words:
        assert word in found.text
    assert "None" not in found.text and "{" not in found.text


def test_the_lines_that_a_card_shows_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("photo.jpg")
    foveate.save(open_base("demo_dynamicvit"), "mine", everything=True)
    code = card(Path("mine")).text.partition("```python\n")[2].partition("```")[0]
    assert code.count("\n") <= 4
    exec(code.replace("hf-hub:OWNER/NAME", "mine"), {})
    assert capsys.readouterr().out.strip() in foveate.backbones.class_names(open_base("demo"))


@pytest.mark.parametrize(
    ("everything", "words"),
    [(False, "Only the method's own parameters"), (True, "a plain model of the same form")],
)
def test_a_card_says_if_the_backbone_is_needed(
    everything: bool, words: str, tmp_path: Path
) -> None:
    """One of a class of its own cannot be made again from plain data."""
    model = foveate.apply(randomise(eva()), "evit")
    foveate.save(model, tmp_path, everything=everything)
    assert json.loads((tmp_path / "foveate.json").read_text())["model"] is None
    found = card(tmp_path).text
    assert 'load("hf-hub:OWNER/NAME", vit)' in found and words in found
    foveate.load(tmp_path, randomise(eva(), seed=2))


def test_a_folder_does_not_say_where_its_model_came_from(tmp_path: Path) -> None:
    """transformers notes the path that a model was loaded from."""
    pytest.importorskip("transformers")
    randomise(hf("ViTForImageClassification")).save_pretrained(tmp_path / "private")
    model = foveate.load(tmp_path / "private", method="evit")
    foveate.save(model, tmp_path / "shared", everything=True)
    assert not any(b"private" in content for content in contents(tmp_path / "shared").values())
    assert foveate.load(tmp_path / "shared").reducer.name == "evit"


def test_a_licence_stands_there_only_if_it_was_given(tmp_path: Path) -> None:
    model = foveate.apply(randomise(vit()), "evit")
    foveate.save(model, tmp_path)
    assert "license" not in (tmp_path / "README.md").read_text()
    foveate.save(model, tmp_path, license="apache-2.0")
    assert card(tmp_path).data.license == "apache-2.0"


@pytest.mark.parametrize("make", [lambda: foveate.apply(randomise(vit()), "svit"), segmenter])
def test_saving_twice_writes_the_same_files(make: Any, tmp_path: Path) -> None:
    model = make()
    foveate.save(model, tmp_path)
    before = contents(tmp_path)
    foveate.save(model, tmp_path)
    assert contents(tmp_path) == before and len(before) == 3


@pytest.mark.parametrize("own", ["# My own words\n", "changed"])
def test_a_card_that_somebody_wrote_is_kept(
    own: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "README.md"
    foveate.save(foveate.apply(randomise(vit()), "evit"), tmp_path)
    text = own if own != "changed" else path.read_text().replace("## Limits", "## Its limits")
    path.write_text(text)
    assert not is_generated(text)
    with caplog.at_level(logging.WARNING):
        foveate.save(foveate.apply(randomise(vit()), "tome(r=2)"), tmp_path)
    assert path.read_text() == text and "is kept" in caplog.text
    assert json.loads((tmp_path / "foveate.json").read_text())["methods"][0]["name"] == "tome"
    path.unlink()
    foveate.save(foveate.apply(randomise(vit()), "tome(r=2)"), tmp_path)
    assert is_generated(path.read_text()) and "tome" in path.read_text()


def test_one_folder_holds_one_kind_of_model(tmp_path: Path) -> None:
    reduced = foveate.apply(randomise(vit()), "evit")
    foveate.save(segmenter(), tmp_path / "segmenter")
    with pytest.raises(ValueError, match="holds a detector or segmenter already"):
        foveate.save(reduced, tmp_path / "segmenter")
    foveate.save(reduced, tmp_path / "reduced")
    with pytest.raises(ValueError, match="holds a model with a method already"):
        foveate.save(segmenter(), tmp_path / "reduced")


def test_folders_without_facts_still_load(tmp_path: Path) -> None:
    """Those of 0.1, and the models that ship, have none."""
    model = foveate.apply(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32), "evit")
    foveate.save(model, tmp_path, everything=True)
    (tmp_path / "README.md").unlink()
    config = json.loads((tmp_path / "foveate.json").read_text())
    del config["about"]
    (tmp_path / "foveate.json").write_text(json.dumps(config))
    again = foveate.load(tmp_path)
    assert not again.training  # as load promises
    pixels = images(size=(32, 32))
    with torch.no_grad():
        assert torch.equal(again(pixels), model.eval()(pixels))


# The record of a run -----------------------------------------------------------------------------


def test_a_record_names_no_folders_of_the_machine(tmp_path: Path) -> None:
    recipe = {
        "data": {"train": "folder:/home/anna/photos/", "val": "C:\\data\\flowers", "mean": [0.5]},
        "model": {"start": "runs/base", "name": None},
        "teacher": "~/big/model.pth",
        "loop": {"seed": 3},
        "at": "https://example.org/a/b",
    }
    write_record(
        tmp_path, recipe, {"splits": {"val": {"data": "coco:/data/coco"}}}, {}, weights="last"
    )
    found = read_record(tmp_path)
    assert found is not None
    assert found["recipe"] == {
        "data": {"train": "folder:photos/", "val": "flowers", "mean": [0.5]},
        "model": {"start": "runs/base", "name": None},
        "teacher": "model.pth",
        "loop": {"seed": 3},
        "at": "https://example.org/a/b",
    }
    assert "anna" not in (tmp_path / "record.json").read_text()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("fashion-mnist:/data", ["zalando-datasets/fashion_mnist"]),
        ("hf:anna/flowers[image=img]", ["anna/flowers"]),
        ("hf:/home/anna/flowers", []),
        ("folder:photos", []),
        (None, []),
    ],
)
def test_data_sets_are_named_where_the_hub_has_them(
    data: str | None, names: list[str], tmp_path: Path
) -> None:
    write_record(tmp_path, {}, {"splits": {"train": {"data": data}}}, {}, weights="last")
    found = read_record(tmp_path)
    assert found is not None and found["datasets"] == names


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    foveate.save(foveate.apply(randomise(vit()), "evit"), tmp_path)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a record of this version"):
        read_record(tmp_path)
    foveate.save(foveate.apply(randomise(vit()), "evit"), tmp_path)  # a new model has no past
    assert read_record(tmp_path) is None
