"""What the page computes, without the page: photographs, models, paths, tables, markup."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import randomise, vit

import foveate
from foveate.app import markup
from foveate.app.find import find
from foveate.app.look import look
from foveate.app.models import Models
from foveate.app.photographs import example, read_upload, scene
from foveate.app.places import Places
from foveate.app.reports import report
from foveate.convert import open_shipped
from foveate.dense import Segmenter, make_dense
from foveate.measure import Results, frame
from foveate.viz import Walk


@pytest.fixture
def photo() -> Image.Image:
    return example(0)[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a saved model and a table, beside one that the page may not open."""
    root, other = tmp_path / "mine", tmp_path / "other"
    foveate.save(foveate.apply(vit(), "evit(keep=0.5)"), root / "evit", everything=True)
    foveate.save(foveate.apply(vit(), "evit(keep=0.5)"), other / "evit", everything=True)
    (root / "deep" / "a" / "b" / "c" / "d").mkdir(parents=True)
    costs = ("macs", 1e9), ("dense_macs", 2e9)
    rows = [
        {"run": "m", "part": "accuracy", "method": name, "metric": metric, "value": value}
        for name, top1 in (("", 90.0), ("evit(keep=0.7)", 89.0))
        for metric, value in (("top1", top1), ("top5", 99.0), ("images", 10), ("tokens", 8), *costs)
    ]
    Results(frame(rows, commit="abc", machine="a <fast> one")).save(root / "table" / "eval.json")
    return root


# A photograph ------------------------------------------------------------------------------------


def test_methods_beside_the_dense_model(photo: Image.Image) -> None:
    rounds: list[tuple[int, int]] = []
    found = look(
        open_shipped("demo"),
        photo,
        ["evit", "tome(r=3)", "svit(keep=0.7)"],
        "0.5",
        rounds=1,
        progress=lambda done, of: rounds.append((done, of)),
    )
    names = ["dense", "evit(keep=0.5)", "tome(r=3)", "svit(keep=0.7)"]
    assert [one.name for one in found.variants] == names
    dense, evit, tome, svit = found.variants
    (answer,) = foveate.predict(open_shipped("demo"), photo, top=5)
    assert dense.answers == tuple(zip(answer.labels, answer.confidences, strict=True))
    assert dense.likeness == pytest.approx(1, abs=1e-5) and 0 < evit.likeness < 1
    counted = foveate.count(foveate.apply(open_shipped("demo"), "evit(keep=0.5)"))
    assert (evit.macs, evit.tokens) == (counted.macs, counted.tokens)
    assert dense.tokens == (50,) * 12 and tome.tokens[-1] == 14
    assert [one.trained for one in found.variants] == [True, True, True, False]
    assert all(one.time is not None and one.time.ms > 0 for one in found.variants)
    assert rounds[-1][0] == rounds[-1][1] == 3 and found.rounds == 1
    table = markup.numbers(found)
    assert "medians of 1 interleaved rounds" in table and "svit(keep=0.7) (untrained)" in table
    assert "50 x 3, 27 x 3, 15 x 3, 9 x 3" in table
    assert svit.walk is not None and found.steps == 12


def test_a_picture_for_each_block(photo: Image.Image) -> None:
    found = look(open_shipped("demo"), photo, ["evit", "tome(r=3)"], rounds=0)
    pages = [markup.walk(found, number) for number in (0, 5, 11)]
    assert len(set(pages)) == 3  # tome merges in every block
    evit = found.variants[1].walk
    assert evit is not None
    drawn = [np.asarray(evit.picture(number)) for number in range(12)]
    changes = [n for n in range(1, 12) if (drawn[n] != drawn[n - 1]).any()]
    assert changes == [3, 6, 9]
    assert evit.words(0) == "49 of 49 patches in 50 tokens"
    assert "1 of the tokens sums up others" in evit.words(3)
    assert [key.words for key in evit.legend()][0] == "left out"
    assert found.variants[0].time is None and "Nothing was timed" in markup.numbers(found)


def test_patches_that_wait_are_shown(photo: Image.Image) -> None:
    model = foveate.apply(open_shipped("demo"), "evit(keep=0.5, recall_before=11)").eval()
    found = look(model, photo, rounds=0)
    walk = found.variants[1].walk
    assert walk is not None and walk.waits[5].sum() > 0 and not walk.waits[11].any()
    assert "brought back later" in walk.words(5)
    assert "unused here, used later" in markup.walk(found, 5)
    # Waiting patches are drawn in a colour, the image is grey.
    pixels = np.asarray(walk.picture(5)).astype(int)
    assert np.ptp(pixels, axis=-1).max() > 60 > np.ptp(np.asarray(photo).astype(int), axis=-1).max()


def test_a_budget(photo: Image.Image) -> None:
    found = look(randomise(vit()).eval(), photo, ["evit"], "60%", rounds=0)
    dense, evit = found.variants
    assert evit.macs / dense.macs == pytest.approx(0.6, abs=0.01)


def test_a_model_with_its_own_method(photo: Image.Image) -> None:
    model = open_shipped("demo_dynamicvit")
    found = look(model, photo, amount="0.5", rounds=0)
    assert [one.name for one in found.variants] == ["dense", "dynamicvit(keep=0.5)"]
    assert found.variants[1].trained
    same = look(model, photo, amount="0.7", rounds=0)  # the rate that it has already
    assert [one.name for one in same.variants] == ["dense", "dynamicvit(keep=0.7)"]
    assert same.steps > 0


def test_a_model_without_classes(photo: Image.Image) -> None:
    model = randomise(vit(num_classes=0)).eval()
    found = look(model, photo, ["evit"], rounds=0)
    assert found.variants[0].answers == () and "has no classifier" in markup.answers(found)


WRONG: dict[str, tuple[Callable[[Image.Image], object], str]] = {
    "no method": (lambda p: look(open_shipped("demo"), p), "choose a method"),
    "unknown method": (
        lambda p: look(open_shipped("demo"), p, ["tomee"]),
        "unknown method 'tomee'; did you mean 'tome'",
    ),
    "code": (
        lambda p: look(open_shipped("demo"), p, ["evit(keep=__import__('os'))"]),
        "the value of keep must be a number",
    ),
    "rate": (
        lambda p: look(open_shipped("demo"), p, ["evit"], "2"),
        r"evit at rate 2: keep must lie in \(0, 1\], got 2",
    ),
    "negative": (
        lambda p: look(open_shipped("demo"), p, ["evit"], "-1"),
        "a rate must be a number above 0, got -1",
    ),
    "budget": (
        lambda p: look(open_shipped("demo"), p, ["evit"], "cheap"),
        "evit: budget must read like '2.9 GMACs'",
    ),
    "budget of a rate": (
        lambda p: look(open_shipped("demo"), p, ["evit(keep=0.5)"], "60%"),
        r"evit\(keep=0.5\): give keep or a budget, not both",
    ),
    "budget of a saved one": (
        lambda p: look(open_shipped("demo_svit"), p, [], "60%"),
        "takes a rate but no budget: '60%' is for plain models",
    ),
    "too many": (lambda p: look(open_shipped("demo"), p, ["evit"] * 7), "at most 6 methods"),
    "rounds": (
        lambda p: look(open_shipped("demo"), p, ["evit"], rounds=1000),
        r"timed rounds must lie in 0..100, got 1000",
    ),
    "detector": (lambda p: look(open_shipped("demo_detector"), p), "in the tab Detection"),
    "second method": (
        lambda p: find(open_shipped("demo_detector"), p, "evit"),
        "has its own method svit",
    ),
    "least": (
        lambda p: find(open_shipped("demo_detector"), p, least=2.0, rounds=0),
        r"least must lie in \[0, 1\], got 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_a_sentence(case: str, photo: Image.Image) -> None:
    work, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        work(photo)


# Detection and segmentation ----------------------------------------------------------------------


def test_a_detector_with_and_without_its_method() -> None:
    found = find(open_shipped("demo_detector"), scene(0)[1], least=0.5, rounds=0)
    dense, svit = found.each
    assert (dense.name, svit.name) == ("dense", "svit(keep=0.7)")
    assert dense.usage is None and svit.usage is not None and 0 < svit.usage < 1
    assert dense.found and all(score >= 0.5 for _, score in dense.found)
    assert svit.macs < dense.macs and svit.picture.width > dense.picture.width  # the map of usage
    text = markup.found(found)
    assert f"{svit.usage:.0%}" in text and "heads behind the proposals" in text
    assert text.count("data:image/webp") == 2


def test_a_segmenter_with_a_method(photo: Image.Image) -> None:
    parts = {"name": "pyramid"}, {"name": "fpn"}
    model = make_dense(randomise(vit(depth=2)), ["sky", "<sea>"], *parts, None).eval()
    assert isinstance(model, Segmenter)
    found = find(model, photo, "evit(keep=0.5, blocks=(1,))", rounds=0)
    assert [one.name for one in found.each] == ["dense", "evit(keep=0.5, blocks=(1,))"]
    assert sum(share for _, share in found.each[0].found) == pytest.approx(1)
    assert "Shares of the pixels" in markup.found(found)
    assert "<sea>" not in markup.found(found)


# Uploads -----------------------------------------------------------------------------------------


def bomb(path: Path) -> Path:
    """Write a PNG of a few bytes that says it has a billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(40_000))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


def test_uploads_that_are_refused(tmp_path: Path) -> None:
    empty, text, large = tmp_path / "empty.png", tmp_path / "text.jpg", tmp_path / "large.png"
    empty.touch()
    text.write_text("not an image")
    large.write_bytes(bytes(2**21))
    for path, words in (
        (empty, "empty.png: not an image"),
        (text, "text.jpg: not an image"),
        (large, "large.png has 2.0 MB; at most 1 MB are allowed"),
        (bomb(tmp_path / "bomb.png"), "bomb.png: more than 178 million pixels"),
        (tmp_path / "gone.png", "gone.png does not exist"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            read_upload(path, 1.0)
        assert str(tmp_path) not in str(refused.value)


def test_a_photograph_is_kept_no_larger_than_needed(tmp_path: Path) -> None:
    Image.new("L", (3200, 800)).save(tmp_path / "wide.png")
    image = read_upload(tmp_path / "wide.png", 20)
    assert (image.mode, image.size) == ("RGB", (1600, 400))


# Paths and models --------------------------------------------------------------------------------


def test_only_the_given_folders_are_opened(folder: Path) -> None:
    places = Places([folder])
    assert places.inside("evit") == places.inside(str(folder / "evit")) == folder / "evit"
    assert places.inside("evit/../table") == folder / "table"
    (folder / "link").symlink_to(folder.parent / "other")
    (folder / "back").symlink_to(folder / "evit")
    (folder / "model.pt").symlink_to("/etc/passwd")
    assert places.inside("back") == folder / "evit"
    outside = ["../other/evit", str(folder.parent / "other"), "/etc/passwd", "link", "link/evit"]
    for path in [*outside, "model.pt", "gone", "~", "/", "..", "evit/../../other"]:
        with pytest.raises(ValueError, match="is not in the folders that this page may open"):
            places.inside(path)
    (folder / "evit" / "foveate.safetensors").unlink()
    (folder / "evit" / "foveate.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="is a link out of the folders"):
        places.inside("evit")
    with pytest.raises(ValueError, match="choose a folder"):
        places.inside(" ")
    with pytest.raises(ValueError, match="takes folders, but /gone is not one"):
        Places(["/gone"])


def test_models_are_named_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places([folder])
    assert places.models(dense=False) == [("mine/evit", str(folder / "evit"))]
    assert places.models(dense=True) == []
    foveate.save(open_shipped("demo_detector"), folder / "detector")
    assert places.models(dense=True) == [("mine/detector", str(folder / "detector"))]
    models = Models(places, most=2)
    first = models.open("evit")
    assert models.open(str(folder / "evit")) is first
    models.open("demo")
    models.open("deit_tiny_patch16_224", untrained=True)
    assert len(models) == 2 and models.open("evit") is not first
    again = models.open("evit")
    foveate.save(foveate.apply(vit(), "evit(keep=0.6)"), folder / "evit", everything=True)
    assert models.open("evit") is not again  # it was written anew
    with pytest.raises(ValueError, match="demo is neither a detector nor a segmenter"):
        models.dense("demo")
    for name, words in (
        ("../other/evit", "is not in the folders"),
        (str(folder.parent / "other" / "evit"), "is not in the folders"),
        ("deit_tny_patch16_224", "did you mean deit_tiny_patch16_224"),
        ("local-dir:/etc", "is not in the folders"),
        ("hf-hub:someone/model", "is not in the folders"),
        ("local-dir:x", "neither a file, a folder nor a model that timm knows"),
        ("", "choose a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            models.open(name)
    # A name that is a file where the page runs, but not in the given folders.
    monkeypatch.chdir(folder.parent / "other")
    (folder.parent / "other" / "deit_tiny_patch16_224").mkdir()
    with pytest.raises(ValueError, match="is a path here"):
        models.open("deit_tiny_patch16_224", untrained=True)


# Runs and tables ---------------------------------------------------------------------------------


def test_a_table_and_its_plots(folder: Path) -> None:
    places = Places([folder])
    assert places.reports() == [("mine/table", str(folder / "table"))]
    found = report(folder / "table")
    assert [sheet.title for sheet in found.sheets] == ["Accuracy on 10 images"]
    assert list(found.pictures) == ["accuracy-macs"]
    text = markup.report(found)
    assert "89.00" in text and "a &lt;fast&gt; one" in text and "data:image/svg+xml" in text
    # What a command wrote beside its table is shown instead.
    (folder / "table" / "eval.md").write_text("# T\n\n## Mine\n\n![a](b.svg)\n\n<script>x</script>")
    text = markup.report(report(folder / "table"))
    assert "<h2>Mine</h2>" in text and "<script>" not in text and "b.svg" not in text


def test_a_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "finetune"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("loop:\n  epochs: 2\n")
    found = report(run)
    assert found.title == "runs/finetune" and len(found.notes) == 2
    assert "has not finished" in found.notes[0] and "logged nothing" in found.notes[1]
    (run / "metrics.csv").write_text(
        "step,epoch,train/loss,val/loss,val/accuracy\n1,0,2.0,,\n2,0,,1.5,50\n4,1,,1.2,60\n"
    )
    content = {"job": "finetune", "score": "accuracy", "updates": 4, "accuracy": 60.0}
    content |= {"images": {"train": 8, "unreadable": 0}, "machine": {"cpu": "c", "threads": 2}}
    (run / "result.json").write_text(json.dumps(content))
    (run / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(run / "samples" / "one.png")
    found = report(run)
    assert found.facts == {
        **{"job": "finetune", "updates": "4", "accuracy": "60", "images": "8 train"},
        "machine": "c, 2 threads",
    }
    assert list(found.pictures) == ["losses and scores", "samples/one"] and not found.notes
    assert "epochs: 2" in markup.report(found)
    for damaged in ("[1, 2]", "{"):
        (run / "result.json").write_text(damaged)
        found = report(run)
        assert not found.facts and "result.json" in found.notes[0] and len(found.pictures) == 2
    assert Places([tmp_path]).reports() == [(f"{tmp_path.name}/runs/finetune", str(run))]


def test_folders_with_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither a run"):
        report(tmp_path)
    (tmp_path / "x.csv").write_text("a\n")
    (tmp_path / "x.json").write_text("{}")
    assert "has no number 'format'" in report(tmp_path).notes[0]


def test_a_walk_of_a_dense_model() -> None:
    model = open_shipped("demo_detector")
    picture = scene(0)[1]
    walk = Walk.of(model.trace([model.pixels(picture)]), picture)
    assert len(walk) == 12 and "brought back later" in " ".join(map(walk.words, range(12)))
