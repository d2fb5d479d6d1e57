"""Predicting with detectors and segmenters: COCO files, label maps, pictures, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from small import randomise, vit

import foveate
from foveate import cli
from foveate.data import open_source
from foveate.dense import DenseModel, make_dense
from foveate.predictions.dense import predict_and_draw, predict_dense

NAMES = ("cat", "dog", "car")
HEADS: dict[str, Any] = {
    "detect": {
        **{"name": "mask_rcnn", "channels": 16, "box_channels": 24, "mask_channels": 16},
        **{"mask_layers": 1, "proposals": [40, 30], "detections": 5, "box_score_thresh": 0.0},
    },
    "segment": {"name": "fpn", "channels": 16},
}


def dense(job: str, method: str | None = None) -> DenseModel:
    torch.manual_seed(0)
    backbone = {"name": "pyramid", "scales": [1, 0.5], "channels": 16}
    found = make_dense(randomise(vit()), NAMES, backbone, HEADS[job], (48, 64))
    return (found if method is None else foveate.apply(found, method, check=False)).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.RandomState(0)
    for name, size in (("one.png", (70, 96)), ("two.png", (90, 60))):
        Image.fromarray(draw.randint(0, 255, (*size, 3)).astype(np.uint8)).save(folder / name)
    (folder / "torn.png").write_bytes(b"no image")
    return folder


def test_objects_as_coco_has_them(photos: Path, tmp_path: Path) -> None:
    model = dense("detect", "svit(keep=0.7)")
    found = predict_dense(model, photos, pictures=tmp_path / "pictures")
    assert [Path(one.image).name for one in found] == ["one.png", "two.png"]
    assert [one.size for one in found] == [(70, 96), (90, 60)] and len(found.unreadable) == 1
    assert all(0 < one.usage <= 1 and len(one.objects) == 5 for one in found)
    found.coco(tmp_path / "found.json")
    coco = COCO(tmp_path / "found.json")
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == list(NAMES)
    for image in coco.loadImgs(coco.getImgIds()):
        entries = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(entries) == 5
        for entry in entries:
            left, top, width, height = entry["bbox"]
            assert left >= 0 and top >= 0 and 0 <= entry["score"] <= 1
            assert left + width <= image["width"] + 0.02
            assert top + height <= image["height"] + 0.02
            assert coco.annToMask(entry).shape == (image["height"], image["width"])
    with Image.open(tmp_path / "pictures/two.png") as drawn:
        assert drawn.width > 3 * 200  # the image, what was found, and the usage
    with pytest.raises(ValueError, match="use foveate.predictions.predict_dense"):
        foveate.predict(model, photos)


def test_an_image_alone_and_in_a_batch(photos: Path) -> None:
    model = dense("detect")
    alone, together = (predict_dense(model, photos, batch=n) for n in (1, 2))
    assert alone[0].usage is None
    for one, other in zip(alone, together, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_label_maps(photos: Path, tmp_path: Path) -> None:
    model = dense("segment", "svit(keep=0.7)")
    found = predict_dense(model, photos, maps=tmp_path / "maps", pictures=tmp_path / "pictures")
    for record in found:
        with Image.open(tmp_path / "maps" / Path(record.image).name) as file:
            labels = np.array(file)
        assert labels.shape == record.size
        assert set(np.unique(labels)) == set(record.classes) <= {0, 1, 2}
        assert sum(record.scores) == pytest.approx(1, abs=1e-5)
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def stored(upright: np.ndarray, turn: int) -> np.ndarray:
    """Turn values as a file has them whose EXIF data say ``turn``."""
    turns = Image.Transpose
    ways = [turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE]
    ways += [turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270]
    return np.array(Image.fromarray(upright).transpose(ways[turn - 2]))


@pytest.mark.parametrize("job", HEADS)
def test_answers_are_in_the_pixels_of_the_file(job: str, tmp_path: Path) -> None:
    """A file that EXIF turns upright is answered as its upright copy, in its own pixels."""
    pixels = np.random.RandomState(0).randint(0, 255, (40, 60, 3)).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos/1.png")
    for turn in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(stored(pixels, turn)).save(tmp_path / f"photos/{turn}.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "photos/9.tif", exif=exif)  # Pillow turns it itself
    maps = tmp_path / "maps" if job == "segment" else None
    found = predict_dense(
        dense(job), tmp_path / "photos", maps=maps, pictures=tmp_path / "pictures"
    )
    wide, tall = (40, 60), (60, 40)
    assert [one.size for one in found] == [wide] * 4 + [tall] * 5
    drawn = [np.array(Image.open(tmp_path / f"pictures/{turn}.png")) for turn in (1, 6)]
    assert drawn[0].shape == drawn[1].shape  # upright
    if maps is not None:
        first, *others = (np.array(Image.open(maps / f"{turn}.png")) for turn in range(1, 9))
        assert len(np.unique(first)) > 1
        for turn, labels in enumerate(others, 2):
            assert labels.tolist() == stored(first, turn).tolist()
        return
    found.coco(tmp_path / "found.json")
    source = open_source(f"coco:{tmp_path}/found.json:{tmp_path}/photos", "all")
    upright = source.sample(0)
    assert upright["masks"].any() and source.sample(8)["image"].size == (40, 60)
    down, across = (np.indices((41, 61), dtype=np.int32)[axis] for axis in (0, 1))
    for turn in range(2, 9):
        sample = source.sample(turn - 1)
        for mask, other in zip(upright["masks"].numpy(), sample["masks"].numpy(), strict=True):
            assert other.tolist() == stored(mask, turn).tolist()
        # Where a corner of the file lies upright; boxes lie between corners of pixels.
        places = [stored(one, turn) for one in (across, down)]
        for box, other in zip(upright["boxes"].numpy(), sample["boxes"].numpy(), strict=True):
            corners = [
                [place[0, 0] + (place[0, 1] - place[0, 0]) * x + (place[1, 0] - place[0, 0]) * y]
                for x, y in (other[:2], other[2:])
                for place in places
            ]
            turned = np.array(corners).reshape(2, 2)
            assert np.concatenate([turned.min(0), turned.max(0)]) == pytest.approx(box, abs=0.03)


def test_a_detector_has_no_label_maps(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a detector, which gives no label maps"):
        predict_dense(dense("detect"), photos, maps=tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_a_model_without_class_names(photos: Path, tmp_path: Path) -> None:
    """Its classes are called by their numbers, in the file too."""
    sizes = dict(channels=16, box_channels=16, detections=5, box_score_thresh=0.0)
    model = foveate.dense.faster_rcnn(randomise(vit()), 3, image_size=(48, 64), **sizes).eval()
    found = predict_dense(model, photos)
    assert found.class_names == model.display_names == ("class 0", "class 1", "class 2")
    found.coco(tmp_path / "found.json")
    content = json.loads((tmp_path / "found.json").read_text())
    named = {one["id"]: one["name"] for one in content["categories"]}
    assert named == {1: "class 0", 2: "class 1", 3: "class 2"}
    assert {one["category_id"] for one in content["annotations"]} <= set(named)
    assert len(content["annotations"]) == 10


def test_one_image_and_its_picture(photos: Path, tmp_path: Path) -> None:
    """They are those that ``predict_dense`` gives."""
    model, path = dense("segment", "svit(keep=0.7)"), photos / "one.png"
    (wanted,) = predict_dense(model, path, pictures=tmp_path / "pictures")
    with Image.open(path) as image, Image.open(tmp_path / "pictures/one.png") as drawn:
        record, picture = predict_and_draw(model, image.convert("RGB"), str(path))
        assert record == wanted and picture.tobytes() == drawn.convert(picture.mode).tobytes()


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in HEADS:
        foveate.save(dense(job, "svit(keep=0.7)"), tmp_path / job)
    detector, segmenter, out = (str(tmp_path / name) for name in ("detect", "segment", "out"))
    images = ["--images", str(photos)]
    assert cli.main(["predict", detector, *images, "--out", f"{out}.json", "--least", "0"]) == 1
    said = capsys.readouterr().out
    assert "out.json (10 objects)" in said and "1 of 3 images could not be read" in said
    assert len(json.loads(Path(f"{out}.json").read_text())["annotations"]) == 10
    assert cli.main(["predict", segmenter, *images, "--out", out, "--pictures", f"{out}-p"]) == 1
    assert "(2 label maps)" in capsys.readouterr().out
    for command, words in (
        ([detector, *images, "--out", "found.csv"], "objects are written as .json"),
        ([segmenter, *images, "--out", "maps.png"], "written into a folder"),
        ([detector, "evit", *images], "has its own method"),
    ):
        assert cli.main(["predict", *command]) == 2
        assert words in capsys.readouterr().err


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "detect"
    foveate.save(dense("detect"), folder)
    config = json.loads((folder / "dense.json").read_text())
    for change, words in (
        ({"class_names": NAMES[:2]}, "does not fit"),
        ({"head": {"name": "mask_rcn"}}, "did you mean 'mask_rcnn'"),
        ({"vit": None}, "see its field 'vit'"),
        ({"format": 9}, "has format 9; this version reads 1"),
    ):
        (folder / "dense.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=words):
            foveate.load(folder)
    by_hand = foveate.dense.mask_rcnn(vit(), 3, channels=16, box_channels=16)
    with pytest.raises(ValueError, match="was put together by hand, .*: make it with"):
        foveate.save(by_hand, tmp_path / "by-hand")
