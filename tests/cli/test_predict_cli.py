"""``foveate predict``: what it prints and writes, and its exit code."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from small import vit

import foveate
from foveate.cli import main
from foveate.convert import save_plain
from foveate.data import CLASSES, fashion_mnist_mini
from foveate.data.demo import demo_vit


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, two of one name and one with brackets in it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    images = fashion_mnist_mini("test").images[::200]
    for number, name in enumerate(("boot.png", "shirt [red].png", "more/boot.png", "more/bag.jpg")):
        Image.fromarray(images[number, 0].numpy()).save(folder / name)
    return folder


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    data = (photos / "more" / "bag.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    Image.open(photos / "boot.png").save(tmp_path / "whole.png")
    return tmp_path


def predict(*words: object) -> int:
    return main(["predict", *map(str, words)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("width", [80, 120])
def test_the_table(
    width: int, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert predict("demo", "evit(keep=0.7)", "tome(r=3)", "--images", photos) == 0
    out = capsys.readouterr().out
    assert f"images in {photos}" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= width
    lines = [line for line in out.splitlines() if "%" in line]
    assert len(lines) == 8  # none is folded
    found = foveate.predict(foveate.apply(demo_vit(), "evit(keep=0.7)"), photos, top=3)
    for line, record in zip(lines[::2], found, strict=True):
        assert Path(record.image).name in line and "evit(keep=0.7)" in line
        assert f"{record.label} " in line and f" {record.confidence:.1%} " in line
        assert f" {record.tokens} " in line
    assert ("further answers" in out) == (width == 120)
    if width == 120:
        assert f"{found[0].labels[1]} {found[0].confidences[1]:.1%}" in lines[0]


def test_files_hold_the_answers_of_every_method(photos: Path, tmp_path: Path) -> None:
    words = ("demo", "evit(keep=0.7)", "--images", photos, "--top", 2)
    assert predict(*words, "--out", tmp_path / "new" / "a.csv", "tome(r=3)") == 0
    assert predict(*words, "--out", tmp_path / "a.json", "tome(r=3)") == 0
    table = rows(tmp_path / "new" / "a.csv")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert content["model"] == "demo" and content["unreadable"] == {}
    answers = [(image, answer) for image in content["images"] for answer in image["answers"]]
    assert len(table) == len(answers) == 4 * 2 * 2
    for row, (image, answer) in zip(table, answers, strict=True):
        assert (row["image"], row["method"]) == (image["image"], image["method"])
        assert float(row["confidence"]) == answer["confidence"]
    for method in ("evit(keep=0.7)", "tome(r=3)"):
        found = foveate.predict(foveate.apply(demo_vit(), method), photos, top=2)
        mine = [row for row in table if row["method"] == method]
        assert [row["label"] for row in mine] == [label for r in found for label in r.labels]
        assert [float(row["confidence"]) for row in mine] == pytest.approx(
            [value for record in found for value in record.confidences]
        )


def test_one_picture_of_each_image(photos: Path, tmp_path: Path) -> None:
    for methods in ([], ["evit(keep=0.7)", "tome(r=3)"]):
        out = tmp_path / str(len(methods))
        assert predict("demo", *methods, "--images", photos, "--pictures", out) == 0
        assert sorted(path.name for path in out.iterdir()) == [
            *("bag.png", "boot-2.png", "boot.png", "shirt [red].png")
        ]
    sizes = []
    for number in "02":
        with Image.open(tmp_path / number / "bag.png") as drawn:
            sizes.append(drawn.size)
    plain, reduced = sizes
    assert reduced[0] > plain[0] + 200 and reduced[1] > 2 * plain[1]


def test_images_that_cannot_be_read(
    damaged: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    assert predict("demo", "evit", "tome", "--images", damaged, "--out", damaged / "a.json") == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "1 of 2 images could not be read"
    assert caplog.text.count("cut.jpg") == 1  # not once for each method
    content = json.loads((damaged / "a.json").read_text(encoding="utf-8"))
    assert list(content["unreadable"]) == [str(damaged / "cut.jpg")]
    assert predict("demo", "--images", damaged, "--strict") == 2
    assert "cut.jpg" in capsys.readouterr().err
    assert predict("demo", "--images", damaged / "cut.jpg") == 2
    assert "cut.jpg" in capsys.readouterr().err


def test_models_of_every_kind(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = photos / "boot.png"
    save_plain(demo_vit(), tmp_path / "vit.safetensors")
    foveate.save(foveate.apply(demo_vit(), "tome(r=3)"), tmp_path / "tome", everything=True)
    run = tmp_path / "finetune-clothes"
    run.mkdir()
    save_plain(demo_vit(), run / "model.safetensors")
    (run / "recipe.yaml").write_text("job: finetune\n")
    (run / "result.json").write_text('{"model": "model.safetensors"}')
    for name in ("vit.safetensors", "tome", "finetune-clothes"):
        out = tmp_path / "a.csv"
        assert predict(tmp_path / name, "--images", image, "--top", 1, "--out", out) == 0
        (row,) = rows(out)
        assert row["label"] == CLASSES[int(row["class"])]
        assert (row["method"], row["tokens"]) == (
            ("tome(r=3)", "14") if name == "tome" else ("", "")
        )
    capsys.readouterr()
    assert predict("vit_tiny_patch16_224", "evit", "--untrained", "--images", image) == 0
    out = capsys.readouterr().out
    assert "class " in out and "tokens of 197" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("demo", "--out", "a.txt"), "a.txt: answers are written as .csv or .json"),
        (("demo", "--top", "0"), "top must be a whole number from 1, got 0"),
        (("demo", "--batch", "0"), "batch must be a whole number from 1, got 0"),
        (("demo", "evitt"), "did you mean 'evit'"),
        (("demo", "--device", "gpu"), "device must be auto, cpu, cuda or cuda:N"),
        (("headless.safetensors",), "VisionTransformer has no classifier"),
        (("demo", "--pictures", "headless.safetensors"), "headless.safetensors"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...],
    message: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_plain(vit(num_classes=0), tmp_path / "headless.safetensors")
    assert predict(*words, "--images", photos) == 2
    said = capsys.readouterr().err
    assert message in said and said.lstrip().startswith("foveate predict: ")
    assert len(said.strip().splitlines()) == 1
