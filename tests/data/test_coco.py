"""Objects as COCO has them: every form of files, and a sentence for each that is wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import SQUARE, annotation, content, folder
from PIL import Image
from pycocotools import mask as library
from torchvision import tv_tensors

from foveate.data import NoSplit, Unreadable, limited, open_images, open_source, open_splits
from foveate.data.rle import decode, encode, pack, rasterise, run_lengths
from foveate.data.sources import CocoSource

# The library's own, as it makes an array of its masks.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TINY = Path(os.environ.get("FOVEATE_TINYCOCO", Path(__file__).parents[3] / "shared/data/tinycoco"))


def coco(root: Path, annotations: list[Any], **more: Any) -> CocoSource:
    source = open_source(f"coco:{folder(root, content(annotations, **more))}")
    assert isinstance(source, CocoSource)
    return source


def inside() -> torch.Tensor:
    """The pixels of ``SQUARE``."""
    mask = torch.zeros(8, 12, dtype=torch.uint8)
    mask[1:5, 2:6] = 1
    return mask


# What is read -------------------------------------------------------------------------------------


def test_targets(tmp_path: Path) -> None:
    """Ids from 0, holes in categories, an image without objects, annotations out of order."""
    source = coco(
        tmp_path,
        [annotation(5, 2, category_id=7), annotation(0, 0), annotation(1, 2, (0, 0, 3, 2.5))],
    )
    assert len(source) == 3 and source.classes == ("cat", "cup")
    assert source.category_ids == (3, 7) and source.labels_of == ("objects",)
    first = source.sample(0)
    assert first["image"].size == (12, 8) and first["image_id"] == 0
    boxes = first["boxes"]
    assert isinstance(boxes, tv_tensors.BoundingBoxes) and boxes.dtype == torch.float32
    assert boxes.tolist() == [[2, 1, 6, 5]] and boxes.canvas_size == (8, 12)
    assert first["labels"].tolist() == [0] and first["area"].tolist() == [16]
    assert isinstance(first["masks"], tv_tensors.Mask) and first["iscrowd"].tolist() == [0]
    assert torch.equal(first["masks"][0].as_subclass(torch.Tensor), inside())
    empty = source.targets(1)
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 8, 12)
    assert empty["labels"].shape == empty["area"].shape == empty["iscrowd"].shape == (0,)
    last = source.targets(2)
    assert last["labels"].tolist() == [1, 0] and last["boxes"][1].tolist() == [0, 0, 3, 2.5]
    assert source.class_counts().tolist() == [2, 1]
    assert "masks" not in source.boxes_only().targets(2)
    assert not source.left_out.reasons


def test_every_form_of_a_mask(tmp_path: Path) -> None:
    """Polygons, run lengths and compressed ones; several parts, and a crowd."""
    (packed,) = encode(inside()[None].numpy())
    plain = run_lengths(packed).tolist()
    parts = [*SQUARE, [8.0, 0.0, 12.0, 0.0, 12.0, 8.0]]
    source = coco(
        tmp_path,
        [
            annotation(1, 0),
            annotation(2, 0, segmentation={"size": [8, 12], "counts": plain}, iscrowd=1),
            annotation(3, 0, segmentation={"size": [8, 12], "counts": packed.decode()}),
            annotation(4, 0, segmentation=parts),
        ],
    )
    found = source.targets(0)
    masks = found["masks"].as_subclass(torch.Tensor)
    assert all(torch.equal(mask, inside()) for mask in masks[:3])
    expected = library.decode(library.merge(library.frPyObjects(parts, 8, 12)))
    assert masks[3].numpy().tolist() == expected.tolist() and masks[3].sum() > masks[0].sum()
    assert found["iscrowd"].tolist() == [0, 1, 0, 0]


def test_a_file_without_masks(tmp_path: Path) -> None:
    source = coco(
        tmp_path, [annotation(1, 0, segmentation=None), annotation(2, 1, segmentation=[])]
    )
    assert not source.masks and "masks" not in source.targets(0)
    assert len(source.targets(0)["boxes"]) == 1


def test_objects_without_a_mask_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside objects with one, samples do not have them, and no number says that they do."""
    bare = [annotation(i, i, category_id=7, segmentation=[]) for i in (0, 1)]
    broken = annotation(2, 2, segmentation=[[1, 1, 3, 3]])
    with caplog.at_level(logging.WARNING):
        source = coco(tmp_path, [annotation(5, 0), *bare, broken])
    assert [len(source.targets(i)["boxes"]) for i in range(3)] == [1, 0, 0]
    assert source.class_counts().tolist() == [1, 0]
    assert source.boxes_only().class_counts().tolist() == [2, 2]
    counts = {reason: count for reason, (count, _) in source.left_out.reasons.items()}
    assert counts == {
        "masks that cannot be used": 1,
        "objects without a mask, used where boxes alone are asked for": 2,
    }
    assert "3 images, 1 objects of 2 classes" in caplog.text


def test_an_object_with_a_mask_alone(tmp_path: Path) -> None:
    one = annotation(1, 0)
    del one["bbox"], one["area"], one["iscrowd"]
    found = coco(tmp_path, [one]).targets(0)
    assert found["boxes"].tolist() == [[2, 1, 6, 5]] and found["area"].tolist() == [16]


def test_run_lengths_are_those_of_the_library() -> None:
    draw = np.random.RandomState(0)
    for _ in range(60):
        height, width = draw.randint(1, 70, 2)
        masks = (draw.rand(2, height, width) > draw.rand()).astype(np.uint8)
        for packed, mask in zip(encode(masks), masks, strict=True):
            lengths = run_lengths(packed)
            assert (decode(lengths, height, width) == mask).all()
            assert pack(lengths.tolist()) == packed
    large = np.zeros((1, 2000, 3000), dtype=np.uint8)
    large[:, 1500:] = 1
    assert (decode(run_lengths(encode(large)[0]), 2000, 3000) == large[0]).all()
    assert encode(np.zeros((0, 4, 5))) == []
    assert rasterise([np.array(SQUARE[0])], 8, 12).tolist() == inside().tolist()


def test_it_is_cheap_to_send_to_workers(tmp_path: Path) -> None:
    source = coco(tmp_path, [annotation(i, i % 3) for i in range(3000)])
    sent = pickle.dumps(source)
    assert len(sent) < 3000 * 250  # arrays: a polygon has 88 bytes, the other facts 90
    again = pickle.loads(sent)
    assert torch.equal(again.targets(2)["masks"], source.targets(2)["masks"])
    assert len(again.targets(2)["masks"]) == 1000


# Where it is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["years", "flat", "images", "roboflow"])
def test_usual_layouts(tmp_path: Path, layout: str) -> None:
    made = content([annotation(1, 0)])
    folder(tmp_path, made, "train", year="2017" if layout == "years" else "")
    if layout == "flat":
        (tmp_path / "annotations/instances_train.json").rename(tmp_path / "instances_train.json")
    elif layout == "images":
        (tmp_path / "images").mkdir()
        (tmp_path / "train").rename(tmp_path / "images/train")
    elif layout == "roboflow":
        old = tmp_path / "annotations/instances_train.json"
        old.rename(tmp_path / "train/_annotations.coco.json")
    source = open_source(f"coco:{tmp_path}")
    assert len(source) == 3 and np.asarray(source.image(2))[0, 0, 0] == 20
    with pytest.raises(NoSplit, match="has the splits train, and no val"):
        open_source(f"coco:{tmp_path}", "val")


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder(tmp_path, content([annotation(1, 0)]), split)
    place = f"{tmp_path}/annotations/instances_%s.json:{tmp_path}/%s"
    assert len(open_source("coco:" + place % ("val", "val"), "all")) == 3
    with pytest.raises(NoSplit, match="has no {split} in it"):
        open_source("coco:" + place % ("val", "val"), "val")
    cut = "coco:" + place % ("{split}", "{split}")
    assert np.asarray(open_source(cut, "val").image(1))[0, 0, 0] == 10
    with pytest.raises(NoSplit, match="instances_test.json, for the split 'test'"):
        open_source(cut, "test")


def test_splits(tmp_path: Path) -> None:
    """Train and validation images of one folder; images in both are refused, as ever."""
    for split in ("train", "val"):
        folder(tmp_path, content([annotation(1, 0)]), split)
    splits = open_splits(f"coco:{tmp_path}", labels_of="objects")
    assert splits.val is not None and splits.val.split == "val" and splits.test is None
    assert splits.common == {"training and validation": (0, 3)}
    part = limited(splits.train, 2, balanced=True)
    assert part.category_ids == (3, 7) and part.labels_of == ("objects",)
    assert "masks" not in part.boxes_only().targets(0)
    same = (tmp_path / "train/1.png").read_bytes()
    (tmp_path / "val/0.png").write_bytes(same)
    with pytest.raises(ValueError, match="1 of 3 validation images are training images too"):
        open_splits(f"coco:{tmp_path}", labels_of="objects")
    with pytest.raises(ValueError, match="name the same images"):
        open_splits(f"coco:{tmp_path}", f"coco:{tmp_path}/", labels_of="objects")


def test_jobs_take_what_they_need_alone(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder(tmp_path, content([annotation(1, 0)]), split)
    message = "has labels of objects; this job needs labels of whole images"
    with pytest.raises(ValueError, match=message):
        open_splits(f"coco:{tmp_path}")
    with pytest.raises(ValueError, match=message):
        open_images(f"coco:{tmp_path}")
    with pytest.raises(ValueError, match="labels of whole images; this job needs labels of pixels"):
        open_splits("fashion-mnist", labels_of="pixels")
    assert open_splits(f"coco:{tmp_path}", "none", labels=False).train.targets(0) == {}


# What is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"image_id": 99},
            "1 annotations of images that are not listed (the first: 40 of image 99",
        ),
        ({"category_id": 5}, "1 annotations of an unknown category (the first: 40, category 5)"),
        ({"bbox": [3, 3, 0, 4]}, "1 boxes without an area (the first: annotation 40, [3.0, 3.0, 0"),
        ({"bbox": [3, 3, -2, 4]}, "1 boxes without an area"),
        ({"bbox": [20, 3, 4, 4]}, "1 boxes outside their image (the first: annotation 40, [20.0"),
        ({"bbox": [2, 3], "segmentation": None}, "1 boxes that are not four finite numbers (the"),
        ({"bbox": [float("nan"), 0, 1, 1], "segmentation": None}, "1 boxes that are not four"),
        ({"segmentation": [[1, 1, 3, 3]]}, "annotation 40: a polygon has 2 points and needs 3"),
        ({"segmentation": [[1, 1, 3, 3, 5]]}, "a polygon has 2 points"),
        ({"segmentation": [[1, 1, 3, 3, 5, "5"]]}, "a polygon has points that are not numbers"),
        ({"segmentation": [[1, 1, 3, 3, 5, float("inf")]]}, "points that are not finite"),
        (
            {"segmentation": {"size": [8, 12], "counts": [5, 5]}},
            "annotation 40: its run lengths add up to 10 pixels, its size is [8, 12]",
        ),
        ({"segmentation": {"size": [2, 5], "counts": [5, 5]}}, "are of [2, 5], its image [8, 12]"),
        ({"segmentation": {"size": [8, 12], "counts": "zzz"}}, "its run lengths are damaged"),
        ({"segmentation": {"size": [8, 12], "counts": [-1, 97]}}, "must be whole numbers from 0"),
        ({"segmentation": {"counts": [96]}}, "run lengths with size and counts"),
        ({"segmentation": [[1, 1, 1e9, 1, 5, 5]]}, "has the coordinate 1e+09, far outside any"),
        ({"segmentation": [[1, 1, 5, -1e300, 5, 5]]}, "has the coordinate -1e+300, far outside"),
        ({"segmentation": [[1, 1, 5, 10**400, 5, 5]]}, "points that are not finite"),
        ({"segmentation": {"size": [8, 12], "counts": [96, 2**40]}}, "whole numbers from 0 to 42"),
        ({"segmentation": {"size": [2**40, 0], "counts": [0]}}, "must be a height and a width"),
        ({"segmentation": {"size": [8, 12], "counts": "KU3"}}, "its run lengths are damaged"),
        ({"bbox": [10**400, 3, 4, 4], "segmentation": None}, "1 boxes that are not four finite"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any], message: str
) -> None:
    with caplog.at_level(logging.WARNING):
        source = coco(tmp_path, [annotation(1, 0), annotation(40, 0, **wrong)])
    assert len(source.targets(0)["labels"]) == 1
    (record,) = caplog.records
    assert message in record.getMessage() and "left out: 1 " in record.getMessage()
    assert f"{tmp_path}/annotations/instances_train.json: 3 images" in record.getMessage()
    # A mask that cannot be used leaves the box.
    boxes = source.boxes_only().targets(0)["boxes"]
    assert len(boxes) == (2 if "segmentation" in wrong and wrong["segmentation"] else 1)


def test_no_annotation_that_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no annotation that can be used: 2 annotations of an unkn"
    ):
        coco(tmp_path, [annotation(i, 0, category_id=9) for i in range(2)])


def test_annotations_that_are_not_known_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = annotation(40, 0)
    del lost["image_id"]
    with caplog.at_level(logging.WARNING):
        coco(tmp_path, [annotation(1, 0), lost])
    assert "1 annotations without an image_id" in caplog.text
    with caplog.at_level(logging.WARNING):
        coco(tmp_path, [annotation(1, 0), {}, None, lost])
    assert "3 annotations without an image_id, or without box and mask (the first: {})" in (
        caplog.text
    )


def test_boxes_are_cut_at_the_border(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        source = coco(
            tmp_path, [annotation(1, 0, (10, -3, 5, 6)), annotation(2, 0, (0, 0, 12.4, 8))]
        )
    assert source.targets(0)["boxes"].tolist() == [[10, 0, 12, 3], [0, 0, 12, 8]]
    assert "1 boxes reach out of their image and were cut" in caplog.text


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}],
            "holds a list, such as predictions are",
        ),
        (json.dumps(content([annotation(1, 0)]))[:-90], "is damaged or cut short"),
        ("", "is damaged or cut short"),
        ("[" * 100_000, "has lists in lists, deeper than any COCO file"),
        (f'{{"images": [{"9" * 5000}]}}', "is damaged or cut short"),
        (annotation(1, 0), "holds a single entry, such as predictions are"),
        ({"images": [], "annotations": []}, "has no list of categories"),
        (content([], count=0), "has no images"),
        (
            content([annotation(1, 0, id="7")]),
            "the id of annotation 0 is '7'; ids are whole numbers",
        ),
        (content([annotation(1, 0, image_id="0")]), "the image_id of annotation 1 is '0'"),
        (content([annotation(1, 0, category_id=None)]), "category_id of annotation 1 is None"),
        (content([], categories=[{"id": "3"}]), "the id of category 0 is '3'"),
        (content([], categories=[{"id": 3}] * 2), "has several categories with the id 3"),
        (content([], categories=[]), "has no categories"),
        (content([], **{"images": [{"id": "a"}]}), "the id of image 0 is 'a'; ids are whole"),
        (content([], **{"images": [{"id": 3, "file_name": "3.png"}]}), "image 3 needs a height"),
        (content([], **{"images": [{"id": 3, "height": 8, "width": 12}]}), "has no file_name"),
        (content([], **{"images": content([])["images"] * 2}), "several images with the id 0"),
        (content([{"id": 1, "image_id": 0, "segments_info": []}]), "is a panoptic file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, made: Any, message: str) -> None:
    root = folder(tmp_path, made)
    with pytest.raises(ValueError) as raised:
        open_source(f"coco:{root}")
    assert message in str(raised.value) and "instances_train.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_places_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; a folder as COCO has it"):
        open_source("coco:/nowhere")
    with pytest.raises(ValueError, match=r"holds no annotations/instances_train\*.json"):
        open_source(f"coco:{tmp_path}")
    with pytest.raises(ValueError, match="names no folder of images"):
        open_source("coco:/nowhere/a.json", "all")
    with pytest.raises(ValueError, match="there is no annotation file /nowhere/a.json"):
        open_source(f"coco:/nowhere/a.json:{tmp_path}", "all")
    folder(tmp_path, content([annotation(1, 0)]), "train")
    folder(tmp_path, content([annotation(1, 0)]), "train", year="2017")
    with pytest.raises(ValueError, match="several annotation files of the split 'train'"):
        open_source(f"coco:{tmp_path}")


def test_images_that_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path, content([annotation(1, 0), annotation(2, 2), annotation(3, 1)]))
    (root / "train/1.png").unlink()
    with caplog.at_level(logging.WARNING):
        source = open_source(f"coco:{root}")
    assert "1 images that" in caplog.text and "image 1, 1.png" in caplog.text
    assert [source.targets(i)["image_id"] for i in range(len(source))] == [0, 2]
    assert np.asarray(source.image(1))[0, 0, 0] == 20 and source.class_counts().tolist() == [2, 0]
    assert "2 images, 2 objects of 2 classes" in caplog.text
    for path in (root / "train").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="holds none of the 3 images"):
        open_source(f"coco:{root}")


def test_images_of_every_kind(tmp_path: Path) -> None:
    """Grey, 16 bits, turned by EXIF, of another size, cut short."""
    root = folder(tmp_path, content([annotation(1, 0)], count=5), images=0)
    place = root / "train"
    Image.new("L", (12, 8), 7).save(place / "0.png")
    Image.fromarray(np.full((8, 12), 257 * 9, dtype=np.uint16)).save(place / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((8, 12, 3), dtype=np.uint8)
    upright[:, :6] = 200
    Image.fromarray(upright).save(place / "2.png", exif=exif)
    Image.new("RGB", (8, 12)).save(place / "3.png")
    (place / "4.png").write_bytes((place / "3.png").read_bytes()[:50])
    source = open_source(f"coco:{root}")
    assert np.asarray(source.image(0)).tolist() == np.full((8, 12, 3), 7).tolist()
    assert np.asarray(source.image(1))[0, 0].tolist() == [9] * 3
    assert np.asarray(source.image(2)).tolist() == upright.tolist()  # as stored
    with pytest.raises(Unreadable, match="is 8 x 12 pixels, and .* says 12 x 8; boxes are in the"):
        source.image(3)
    with pytest.raises(Unreadable, match="4.png"):
        source.image(4)


# Real images --------------------------------------------------------------------------------------


def test_tinycoco() -> None:
    if not TINY.is_dir():
        pytest.skip(f"{TINY} does not exist")
    source = open_source(f"coco:{TINY}")
    assert isinstance(source, CocoSource) and len(source) == 32 and len(source.classes or ()) == 80
    assert source.class_counts().sum() == 288 and not source.left_out.reasons
    assert source.category_ids is not None and source.category_ids[-1] == 90
    stored = json.loads((TINY / "instances_train2017.json").read_text())
    crowds = 0
    for index in range(len(source)):
        sample = source.sample(index)
        width, height = sample["image"].size
        own = [a for a in stored["annotations"] if a["image_id"] == sample["image_id"]]
        assert len(own) == len(sample["labels"])
        for one, mask in zip(own, sample["masks"].numpy(), strict=True):
            runs: Any = library.frPyObjects(one["segmentation"], height, width)
            runs = library.merge(runs) if isinstance(runs, list) else runs
            assert (library.decode(runs) == mask).all()
        crowds += int(sample["iscrowd"].sum())
    assert crowds == 4
