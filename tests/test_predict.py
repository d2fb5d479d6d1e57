"""``foveate.predict``: the answers are those of a direct forward pass, whatever the image."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small import hf, randomise, vit
from torch import Tensor, nn

import foveate
from foveate.backbones import set_class_names, set_image_settings
from foveate.convert import save_plain
from foveate.data import CLASSES, fashion_mnist_mini, normalise, read_image
from foveate.data.demo import demo_vit
from foveate.predictions import Prediction, picture

MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)


@pytest.fixture(scope="module")
def clothes() -> Tensor:
    """Ten test images, ``[10, 1, 28, 28]`` uint8."""
    return fashion_mnist_mini("test").images[::200]


@pytest.fixture(scope="module")
def photos(clothes: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files of three modes, with one damaged JPEG among them."""
    folder = tmp_path_factory.mktemp("predict") / "photos"
    folder.mkdir()
    for number, image in enumerate(pictures(clothes)):
        mode = ("L", "RGB", "P")[number % 3]
        image.convert(mode).save(folder / f"{number}-{mode}.png")
    pictures(clothes)[0].resize((280, 280)).save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    return folder


def pictures(clothes: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image[0].numpy()) for image in clothes]


def answered(model: nn.Module, images: Tensor) -> Tensor:
    """Softmax of the model's own answer."""
    with torch.no_grad():
        answer = model(images)
    return getattr(answer, "logits", answer).softmax(-1)


def check(found: foveate.Predictions, wanted: Tensor, names: tuple[str, ...], top: int) -> None:
    values, classes = wanted.topk(top)
    assert [list(record.classes) for record in found] == classes.tolist()
    assert [record.labels for record in found] == [
        tuple(names[n] for n in row) for row in classes.tolist()
    ]
    shown = torch.tensor([record.confidences for record in found])
    torch.testing.assert_close(shown, values, rtol=1e-5, atol=1e-6)


# The answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "evit(keep=0.7)", "svit(keep=0.7)"])
def test_files_of_every_mode_are_answered_as_by_the_model(
    method: str | None, clothes: Tensor, photos: Path
) -> None:
    model: nn.Module = demo_vit()
    if method is not None:
        torch.manual_seed(0)  # gates are new
        model = foveate.apply(model, method).eval()
    found = foveate.predict(model, photos, top=4, batch=3)
    check(found, answered(model, normalise(clothes)), CLASSES, 4)
    modes = ["L", "RGB", "P"] * 4
    assert [record.image for record in found] == [
        str(photos / f"{n}-{modes[n]}.png") for n in range(10)
    ]
    assert found.model == "VisionTransformer"
    assert [record.method for record in found] == [method and repr(model.reducer)] * 10
    labels = fashion_mnist_mini("test").labels[::200].tolist()
    right = sum(record.classes[0] == label for record, label in zip(found, labels, strict=True))
    assert right >= 6  # the demo is a trained model


def test_tokens_are_those_that_the_last_block_feeds_forward(clothes: Tensor) -> None:
    for method in ("evit(keep=0.7)", "svit(keep=0.7)", "tome(r=3)"):
        model = foveate.apply(demo_vit(), method).eval()
        found = foveate.predict(model, pictures(clothes), batch=4)
        trace = model.trace(normalise(clothes))
        assert tuple(record.tokens for record in found) == trace.counts()[-1]
    assert {record.tokens for record in foveate.predict("demo", pictures(clothes))} == {None}


def test_tokens_that_do_not_take_part_are_not_counted(clothes: Tensor) -> None:
    model = foveate.apply(demo_vit(), "svit(keep=0.5)").eval()
    packed = foveate.predict(model, pictures(clothes))
    model.mode = "masked"
    masked = foveate.predict(model, pictures(clothes))
    assert [r.tokens for r in masked] == [r.tokens for r in packed]
    assert min(r.tokens for r in packed) < 50


def test_preprocessing_is_the_models_own() -> None:
    """The short side to 48 / 0.75 = 64, the middle cut out, then mean and spread."""
    model = randomise(vit()).eval()
    model.pretrained_cfg = {}
    set_image_settings(
        model, {"mean": MEAN, "std": STD, "crop_pct": 0.75, "interpolation": "bilinear"}
    )
    pixels = np.random.default_rng(0).integers(0, 256, (80, 128, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    small = image.resize((102, 64), Image.Resampling.BILINEAR).crop((27, 8, 75, 56))
    x = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    names = tuple(f"class {n}" for n in range(10))
    check(foveate.predict(model, image, top=10), answered(model, x), names, 10)


def test_hugging_face_models(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = randomise(hf("ViTForImageClassification")).eval()
    names = tuple(f"kind {n}" for n in range(10))
    set_class_names(model, names)
    model.save_pretrained(tmp_path / "model")
    said = {"resample": 3, "image_mean": MEAN, "image_std": STD}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(said))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    image = Image.fromarray(pixels)
    found = foveate.predict(tmp_path / "model", image)
    check(found, answered(model, x), names, 5)
    assert found.model == str(tmp_path / "model")

    # The same through a method, and from a folder of ours.
    reduced = foveate.load(tmp_path / "model", method="evit(keep=0.7)")
    foveate.save(reduced, tmp_path / "reduced", everything=True)
    check(foveate.predict(str(tmp_path / "reduced"), image), answered(reduced, x), names, 5)


def test_models_by_name_file_and_module_agree(clothes: Tensor, tmp_path: Path) -> None:
    save_plain(demo_vit(), tmp_path / "demo.safetensors")
    first = foveate.predict("demo", pictures(clothes))
    for model in (demo_vit(), tmp_path / "demo.safetensors"):
        assert foveate.predict(model, pictures(clothes)).records == first.records


def test_bf16_is_mixed_precision(clothes: Tensor) -> None:
    model = demo_vit()
    exact, mixed = (
        torch.tensor([r.confidences[0] for r in foveate.predict(model, pictures(clothes), **how)])
        for how in ({}, {"precision": "bf16"})
    )
    assert not torch.equal(exact, mixed)
    torch.testing.assert_close(exact, mixed, rtol=0, atol=0.05)
    assert next(model.parameters()).dtype == torch.float32


def test_the_model_stays_as_it_was(clothes: Tensor) -> None:
    model = demo_vit().train()
    model.blocks[3].eval()
    before = [module.training for module in model.modules()]
    again = foveate.predict(model, pictures(clothes))
    assert [module.training for module in model.modules()] == before
    assert again.records == foveate.predict("demo", pictures(clothes)).records  # no dropout


def test_a_batch_of_any_size_and_progress(clothes: Tensor) -> None:
    told: list[tuple[int, int]] = []
    one = foveate.predict(
        "demo", pictures(clothes), batch=4, progress=lambda *done: told.append(done)
    )
    assert told == [(4, 10), (8, 10), (10, 10)]
    all_ = foveate.predict("demo", pictures(clothes))
    for a, b in zip(one, all_, strict=True):
        assert a.classes == b.classes and a.confidences == pytest.approx(b.confidences, abs=1e-5)


# The result ------------------------------------------------------------------------------------


def test_csv_and_json_hold_the_same_numbers(photos: Path, tmp_path: Path) -> None:
    model = foveate.apply(demo_vit(), "evit(keep=0.7)").eval()
    found = foveate.predict(model, photos, top=2)
    found.csv(tmp_path / "new" / "answers.csv")
    found.json(tmp_path / "answers.json")
    with (tmp_path / "new" / "answers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 == len(found.rows())
    content = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert content["model"] == "VisionTransformer"
    assert list(content["unreadable"]) == [str(photos / "cut.jpg")]
    pairs = iter(rows)
    for record, image in zip(found, content["images"], strict=True):
        assert image["image"] == record.image and image["tokens"] == record.tokens
        for rank, answer in enumerate(image["answers"], 1):
            row = next(pairs)
            assert row["image"] == record.image and int(row["tokens"]) == record.tokens
            assert row["method"] == image["method"] == "evit(keep=0.7)"
            assert int(row["rank"]) == rank
            assert int(row["class"]) == answer["class"] == record.classes[rank - 1]
            assert row["label"] == answer["label"] == CLASSES[answer["class"]]
            confidence = record.confidences[rank - 1]
            assert float(row["confidence"]) == answer["confidence"] == confidence


def test_predictions_are_a_sequence(clothes: Tensor) -> None:
    found = foveate.predict("demo", pictures(clothes)[:3], top=2)
    assert len(found) == 3 and found[-1].image == "image 2" and list(found[:2]) == list(found)[:2]
    first = found[0]
    assert (first.label, first.confidence) == (first.labels[0], first.confidences[0])
    assert first.confidences[0] > first.confidences[1] and sum(first.confidences) <= 1


def test_top_is_at_most_the_number_of_classes(clothes: Tensor) -> None:
    record = foveate.predict("demo", pictures(clothes)[0], top=50)[0]
    assert sorted(record.classes) == list(range(10))
    assert math.isclose(sum(record.confidences), 1, rel_tol=1e-5)


# What is refused -------------------------------------------------------------------------------


def test_a_damaged_image_is_skipped_or_refused(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = foveate.predict("demo", photos)
    assert len(found) == 10 and list(found.unreadable) == [str(photos / "cut.jpg")]
    assert "truncated" in found.unreadable[str(photos / "cut.jpg")]
    assert "cut.jpg" in caplog.text
    with pytest.raises(ValueError, match="cut.jpg"):
        foveate.predict("demo", photos, strict=True)
    with pytest.raises(ValueError, match="cut.jpg"):
        foveate.predict("demo", photos / "cut.jpg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be a whole number from 1, got 0"),
        ({"batch": 1.5}, "batch must be a whole number from 1, got 1.5"),
        ({"precision": "fp64"}, "precision must be one of"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "meta"}, "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:99"}, "torch finds no device cuda:99"),
        ({"images": []}, "no images were given"),
        ({"images": "nowhere"}, "nowhere does not exist"),
        ({"images": np.zeros((2, 2))}, "must all be paths or all be PIL images, got ndarray"),
        ({"images": [Image.new("L", (9, 9)), "a.png"]}, "must all be paths or all be PIL images"),
        ({"model": "vit_tinny_patch16_224"}, "did you mean vit_tiny_patch16_224"),
    ],
)
def test_bad_input_is_one_sentence(options: dict, message: str) -> None:
    given = {"model": "demo", "images": Image.new("L", (28, 28)), **options}
    with pytest.raises(ValueError, match=message):
        foveate.predict(**given)


def test_models_without_a_classifier() -> None:
    for model in (vit(num_classes=0), foveate.apply(vit(num_classes=0), "tome(r=2)")):
        with pytest.raises(ValueError, match="VisionTransformer has no classifier"):
            foveate.predict(model, Image.new("RGB", (48, 48)))
    pytest.importorskip("transformers")
    for name in ("ViTModel", "CLIPVisionModelWithProjection"):
        with pytest.raises(ValueError, match=f"{name} has no classifier"):
            foveate.predict(hf(name), Image.new("RGB", (48, 48)))


def test_broken_weights_are_said() -> None:
    model = vit()
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        foveate.predict(model, Image.new("RGB", (48, 48)))


# Pictures --------------------------------------------------------------------------------------


def test_pictures_show_more_with_a_method(clothes: Tensor) -> None:
    image = pictures(clothes)[9].convert("RGB")
    plain = demo_vit()
    reduced = foveate.apply(plain, "evit(keep=0.7)").eval()
    sizes = SimpleNamespace()
    for name, model in (("plain", plain), ("reduced", reduced)):
        drawn = picture(model, image, foveate.predict(model, image)[0])
        setattr(sizes, name, drawn.width)
    assert sizes.reduced > sizes.plain + 200  # a panel more


def test_bars_are_as_long_as_the_confidence() -> None:
    model, image = vit().eval(), Image.new("RGB", (448, 448), "red")

    def blue(confidence: float) -> float:
        record = Prediction("a.png", None, (1,), ("cat",), (confidence,), None)
        pixels = np.asarray(picture(model, image, record)).astype(int)
        return float((np.abs(pixels - (168, 208, 236)).sum(-1) < 10).sum())

    assert blue(0.0) < 0.02 * blue(1.0)
    assert blue(0.5) == pytest.approx(0.5 * blue(1.0), rel=0.1)


def test_what_the_model_does_not_see_is_faded(tmp_path: Path) -> None:
    """A crop of 0.5 shows the middle quarter of a square image and leaves the rim."""
    model = vit().eval()
    set_image_settings(model, {"crop_pct": 0.5})
    pixels = np.zeros((200, 200, 3), dtype=np.uint8)
    pixels[50:150, 50:150] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    drawn = np.asarray(picture(model, image, foveate.predict(model, image)[0])).astype(int)
    assert not (drawn.sum(-1) == 0).any()  # no black is left: all of it was cropped away
    red = (drawn == (255, 0, 0)).all(-1)
    assert red.sum() == 200 * 200  # enlarged twice
