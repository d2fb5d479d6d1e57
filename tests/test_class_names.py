"""Names of classes: where models keep them, and that they travel with what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file, save_file
from small import hf, randomise, vit
from torch import nn

import foveate
from foveate.backbones import class_names, set_class_names
from foveate.convert import named, open_base, save_plain
from foveate.data import CLASSES
from foveate.data.demo import demo_vit

NAMES = tuple(f"kind {n}" for n in "abcdefghij")


def hugging_face() -> nn.Module:
    pytest.importorskip("transformers")
    return randomise(hf("ViTForImageClassification"))


@pytest.mark.parametrize("make", [vit, hugging_face])
def test_names_are_set_and_read_also_through_a_method(make) -> None:  # noqa: ANN001
    model = make()
    assert class_names(model) is None
    reduced = foveate.apply(model, "evit(keep=0.7)")
    set_class_names(reduced, NAMES)
    assert class_names(model) == class_names(reduced) == NAMES


def test_the_demo_has_names() -> None:
    assert class_names(demo_vit()) == CLASSES


def test_libraries_know_the_names_too() -> None:
    model = vit()
    set_class_names(model, NAMES)
    assert model.pretrained_cfg["label_names"] == NAMES  # timm
    model = hugging_face()
    set_class_names(model, NAMES)
    assert model.config.id2label[3] == "kind d" and model.config.label2id["kind d"] == 3


def test_descriptions_of_timm_are_read_before_codes() -> None:
    model = vit(num_classes=2)
    model.pretrained_cfg = {
        "label_names": ["n01", "n02"],
        "label_descriptions": {"n01": "tench"},
    }
    assert class_names(model) == ("tench", "n02")
    set_class_names(model, ["n01", "cat"])
    assert class_names(model) == ("n01", "cat")


def test_names_of_a_head_that_was_replaced_do_not_count() -> None:
    model = vit()
    set_class_names(model, NAMES)
    model.reset_classifier(3)
    assert class_names(model) is None
    for wrong in (NAMES, ()):
        with pytest.raises(ValueError, match="3 outputs needs 3 class names, got"):
            set_class_names(model, wrong)
    model.reset_classifier(0)
    assert class_names(model) is None


# They travel -----------------------------------------------------------------------------------


def test_a_plain_file(tmp_path: Path) -> None:
    model, path = vit(), tmp_path / "plain.safetensors"
    save_plain(model, path)
    assert class_names(foveate.load(path)) is None  # as files of earlier versions
    set_class_names(model, ["Ünïcode", *NAMES[1:]])
    save_plain(model, path)
    assert class_names(foveate.load(path)) == ("Ünïcode", *NAMES[1:])
    reduced = foveate.load(path, method="tome(r=2)")
    assert class_names(reduced) == ("Ünïcode", *NAMES[1:])


@pytest.mark.parametrize("make", [vit, hugging_face])
def test_a_folder_of_a_reduced_model(make, tmp_path: Path) -> None:  # noqa: ANN001
    model = make()
    set_class_names(model, NAMES)
    foveate.save(foveate.apply(model, "evit(keep=0.7)"), tmp_path, everything=True)
    assert class_names(foveate.load(tmp_path)) == NAMES

    config = json.loads((tmp_path / "foveate.json").read_text())
    del config["class_names"]  # an earlier version; transformers keeps them by itself
    (tmp_path / "foveate.json").write_text(json.dumps(config))
    assert class_names(foveate.load(tmp_path)) == (None if make is vit else NAMES)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    model = hugging_face()
    set_class_names(model, NAMES)
    model.save_pretrained(tmp_path)
    assert class_names(foveate.load(tmp_path)) == NAMES


def test_preprocessing_of_a_hugging_face_folder_travels_with_a_method(tmp_path: Path) -> None:
    hugging_face().save_pretrained(tmp_path / "hf")
    said = {"do_center_crop": True, "crop_size": 48, "size": {"height": 64, "width": 60}}
    said |= {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(said))
    foveate.save(
        foveate.load(tmp_path / "hf", method="evit(keep=0.7)"), tmp_path / "out", everything=True
    )
    found = foveate.load(tmp_path / "out").pretrained_cfg
    assert found["mean"] == (0.1, 0.2, 0.3) and found["std"] == (1.0, 2.0, 3.0)
    assert found["crop_pct"] == 0.8 and found["interpolation"] == "bilinear"

    for damaged in ("{", "[1]", '{"resample": 77}', '{"do_center_crop": true}'):
        (tmp_path / "hf" / "preprocessor_config.json").write_text(damaged)
        with pytest.raises(ValueError, match="preprocessor_config.json"):
            foveate.load(tmp_path / "hf")


@pytest.mark.parametrize("wrong", ["NAMES", '"kind a"', '["kind a"]', "{}"])
def test_damaged_names_are_named(wrong: str, tmp_path: Path) -> None:
    save_plain(vit(), tmp_path / "plain.safetensors")
    tensors = load_file(tmp_path / "plain.safetensors")
    metadata = {"foveate.class_names": wrong, "foveate.num_heads": "3"}
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    with pytest.raises(ValueError, match=r"wrong\.safetensors has metadata foveate\.class_names"):
        foveate.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize("wrong", ["kind a", ["kind a"], {"0": "kind a"}, 5])
def test_damaged_names_of_a_folder_are_named(wrong: object, tmp_path: Path) -> None:
    foveate.save(foveate.apply(vit(), "evit"), tmp_path, everything=True)
    config = json.loads((tmp_path / "foveate.json").read_text())
    (tmp_path / "foveate.json").write_text(json.dumps({**config, "class_names": wrong}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        foveate.load(tmp_path)


# ImageNet --------------------------------------------------------------------------------------


def test_timms_own_weights_are_of_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(named.timm, "create_model", lambda name, pretrained: create(name))
    names = class_names(open_base("vit_tiny_patch16_224"))
    assert names is not None and len(names) == 1000
    assert names[0].startswith("tench") and names[281].startswith("tabby")
    # Random weights know no class, and a model of timm may have been trained on anything.
    assert class_names(open_base("vit_tiny_patch16_224", untrained=True)) is None
