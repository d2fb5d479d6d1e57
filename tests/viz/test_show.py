"""``foveate show``: what it writes, what it says of bad input, and where MODEL comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from contract.table import FORMS
from pictures import photo, traced
from PIL import Image

import foveate
from foveate.cli import main
from foveate.cli.models import open_models
from foveate.convert import open_base, save_plain


def show(*words: object) -> int:
    return main(["show", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, one with its method, images and a file that is none."""
    place = tmp_path_factory.mktemp("show")
    plain = FORMS["vit"]()
    save_plain(plain, place / "plain.safetensors")
    foveate.save(foveate.apply(plain, "svit", gate="topk"), place / "svit", everything=True)
    (place / "photos" / "more").mkdir(parents=True)
    photo().save(place / "photos" / "cat.png")
    photo(100, 80).save(place / "photos" / "more" / "cat.png")
    (place / "photos" / "text.jpg").write_text("text")
    return place


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: opened(path).size for path in sorted(folder.iterdir())}


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image


def test_a_sheet_of_methods_and_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / "sheet.png"
    words = (folder / "plain.safetensors", "evit(keep=0.7)", "--images", folder / "photos")
    # Methods may also stand behind the options.
    assert show(*words, "--out", out, "tome(r=3)") == 0
    width, height = opened(out).size
    assert width > 3 * 256 and height > 2 * 200
    assert str(out) in capsys.readouterr().out
    assert "text.jpg: not an image" in caplog.text and "1 of 3 files were skipped" in caplog.text
    assert [p.name for p in out.parent.iterdir()] == ["sheet.png"]


def test_a_segmenter_is_drawn_on_images_of_any_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parts = {"name": "pyramid", "scales": [1, 0.5], "channels": 8}, {"name": "fpn", "channels": 8}
    model = foveate.dense.make_dense(FORMS["vit"](), ["a", "b"], *parts, None)
    foveate.save(model, tmp_path / "plain")
    foveate.save(foveate.apply(model, "evit(keep=0.5)"), tmp_path / "evit")
    images = ("--images", folder / "photos" / "cat.png")
    out = tmp_path / "out.png"
    assert show(tmp_path / "evit", *images, "--kind", "depth", "--out", out) == 0
    assert show(tmp_path / "plain", "tome(r=0.1)", *images, "--out", out) == 0
    assert opened(out).size[0] > 256
    capsys.readouterr()
    for words, said in (
        ((tmp_path / "plain", *images), "has no method: name one"),
        ((tmp_path / "evit", *images, "--kind", "heat"), "--kind heat is of ViTs"),
        ((tmp_path / "evit", *images, "--fit", "crop"), "takes images of any size whole"),
    ):
        assert show(*words, "--out", out) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["kept", "groups", "depth", "brought-back", "heat"])
def test_every_kind_one_file_a_picture(kind: str, folder: Path, tmp_path: Path) -> None:
    assert (
        show(folder / "svit", "--images", folder / "photos", "--kind", kind, "--out", tmp_path) == 0
    )
    names = list(sizes(tmp_path))
    assert len(names) == 2 and all(n.startswith("cat-") and n.endswith(".png") for n in names)
    assert (
        show(
            *(folder / "svit", "--images", folder / "photos", "--kind", kind),
            *("--out", tmp_path / "all.jpg", "--fit", "aspect"),
        )
        == 0
    )
    assert opened(tmp_path / "all.jpg").format == "JPEG"


def test_several_methods_several_files(folder: Path, tmp_path: Path) -> None:
    words = (
        folder / "plain.safetensors",
        "evit(keep=0.7)",
        "evit(keep=0.5, blocks=[1]) + tome(r=2, blocks=[2, 3])",
    )
    image = folder / "photos" / "cat.png"
    assert show(*words, "--images", image, "--kind", "kept", "--out", tmp_path / "out") == 0
    assert list(sizes(tmp_path / "out")) == [
        "cat-evit_keep=0.5_blocks=_1_+_tome_r=2_blocks=_2_3_-kept.png",
        "cat-evit_keep=0.7_-kept.png",
    ]


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("plain.safetensors", ("--images", "photos"), "has no method: name one"),
        ("svit", ("evit", "--images", "photos"), "has its own method svit"),
        ("plain.safetensors", ("evitt", "--images", "photos"), "did you mean 'evit'"),
        ("plain.safetensors", ("evit", "--images", "nowhere"), "does not exist"),
        ("plain.safetensors", ("evit", "--images", "photos/text.jpg"), "text.jpg: not an image"),
        ("plain.safetensors", ("evit", "--images", "photos", "--strict"), "text.jpg: not an image"),
        (
            "plain.safetensors",
            ("evit", "--images", "photos", "--out", "a.gift"),
            "written as .jpeg",
        ),
        ("deit_tini_patch16_224", ("evit", "--images", "photos"), "deit_tiny_patch16_224"),
        (
            "plain.safetensors",
            ("--images", "photos", "--kind", "heat", "--target", "10"),
            "target must lie in 0..9",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    model: str,
    words: tuple[str, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert show(model, "--out", "out.png", *words) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and said.startswith("foveate show: ")
    assert not (folder / "out.png").exists()


def test_unwritable_places_are_said_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "a.png", tmp_path / "file"):
        assert show("no model", "evit", "--images", folder / "photos", "--out", out) == 2
        said = capsys.readouterr().err
        assert "file" in said and len(said.splitlines()) == 1


def test_models_are_files_folders_and_names(folder: Path) -> None:
    assert open_base("vit_tiny_patch16_224", untrained=True).embed_dim == 192
    assert not open_base(str(folder / "plain.safetensors")).training
    first, second = open_models(str(folder / "plain.safetensors"), ["evit", "tome(r=2)"])
    assert first.vit is second.vit and repr(second.reducer) == "tome(r=2)"
    with pytest.raises(ValueError, match="neither a file, a folder nor a model that timm knows"):
        open_base("somebody/something")


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no network.\nA long explanation")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"no network\. Random ones come with --untrained"):
        open_base("vit_tiny_patch16_224")


def test_no_display_and_no_backend_are_needed() -> None:
    """And matplotlib is imported by pictures alone, without its plotting."""
    code = """
import os, sys, foveate
assert "matplotlib" not in sys.modules
from PIL import Image
from foveate.viz.layout import Bar, Cell, page
page([Cell(Image.new("RGB", (50, 50)))], ["title"], bar=Bar("words", ["0", "1"]))
assert "matplotlib.pyplot" not in sys.modules
assert os.environ["MPLBACKEND"] == "nonsense"
"""
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"}
    environment |= {"MPLBACKEND": "nonsense", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_models_own_images_are_left_alone() -> None:
    """Drawing changes neither image nor model."""
    from foveate import viz

    model = traced("evit")[0]
    image = photo().copy()
    viz.draw(model, image, "groups")
    assert image.tobytes() == photo().tobytes()
