"""Evaluating detectors and segmenters: scores, multiply-adds, usage, speed, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import randomise, vit

import foveate
from foveate import cli
from foveate.data import CLASSES, Unreadable, open_source
from foveate.data.scenes import PIXEL_CLASSES
from foveate.data.sources import SceneSource
from foveate.dense import DenseModel, make_dense
from foveate.measure import Plan, evaluate_dense, one, select

SCENES = "scenes:size=32,train=8,val=4,test=4,colour=true"
HEADS: dict[str, Any] = {
    "detect": {
        **{"name": "mask_rcnn", "channels": 16, "box_channels": 24, "mask_channels": 16},
        **{"mask_layers": 1, "proposals": [40, 30], "detections": 5, "box_score_thresh": 0.0},
    },
    "segment": {"name": "fpn", "channels": 16},
}


def dense(job: str, method: str | None = None) -> DenseModel:
    torch.manual_seed(0)
    names = CLASSES if job == "detect" else PIXEL_CLASSES
    backbone = {"name": "pyramid", "scales": [1, 0.5], "channels": 16}
    found = make_dense(randomise(vit()), names, backbone, HEADS[job], None)
    if method is not None:
        found = foveate.apply(found, method, check=False)
        randomise(found.reducer, seed=1)
    return found.eval()


def test_a_detector_with_its_method() -> None:
    model = dense("detect", "svit(keep=0.5)")
    plan = Plan(data=SCENES, split="train", limit=4, batch=2, device="cpu", calibration=4)
    found = evaluate_dense({"mine": model}, plan)  # calibrated on the same images
    method = repr(model.reducer)
    names = ("", method, f"{method} calibrated")
    for name in names:
        keys = {"part": "dense", "method": name}
        assert 0 <= one(found.table, "box_ap", **keys) <= 1
        assert 0 <= one(found.table, "mask_ap", **keys) <= 1
        assert one(found.table, "images", **keys) == 4
        whole, backbone = (one(found.table, m, **keys) for m in ("macs", "backbone_macs"))
        assert 0 < backbone < whole
    used = [one(found.table, "usage", part="dense", method=name) for name in names]
    macs = [one(found.table, "backbone_macs", part="dense", method=name) for name in names]
    assert used[0] == 1 > used[1] and macs[0] > macs[1] and used[2] != used[1]
    shares = select(found.table, part="usage", method=names[2])["value"].tolist()
    assert len(shares) == 4 and shares[0] == 1
    targets = [model.reducer.target(stage) for stage in range(3)]
    assert shares[1:] == pytest.approx(targets, abs=0.02)
    # What is evaluated is left as it was.
    assert all(p.requires_grad for p in model.rpn.parameters())


def test_multiply_adds_of_a_dense_backbone() -> None:
    """The ViT's own count and that of the pyramid's convolutions."""
    model = dense("segment")
    plan = Plan(data=SCENES, batch=4, speed=(2,), rounds=3, device="cpu")
    found = evaluate_dense({"mine": model}, plan)
    timed = select(found.table, part="dense speed", at=2).set_index("metric")["value"]
    assert timed["backbone_per_second"] > timed["per_second"] > 0
    assert timed["low"] <= timed["times"] <= timed["high"] and timed["rounds"] == 3
    reduced = model.reduced
    backbone = one(found.table, "backbone_macs", part="dense", method="")
    spec = reduced.backbone.spec
    own = foveate.count(reduced, (32, 32)).macs - spec.head_cost
    convolutions = 0
    for level in model.backbone.levels:
        cells = int(16 * level.narrow.scale**2)
        width, out = level.narrow.conv.in_channels, level.narrow.conv.out_channels
        convolutions += cells * (width * out + 9 * out * out)
        convolutions += cells * 4 * width * width * (level.narrow.scale < 1)
    assert backbone == pytest.approx(own + convolutions, rel=0.01)


def test_a_segmenter_is_measured_over_the_data_set() -> None:
    model = dense("segment")
    found = foveate.evaluate({"mine": model}, SCENES, batch=3, device="cpu")
    source = open_source(SCENES, "test")
    both = torch.zeros(11, 11)
    for index in range(4):
        sample = source.sample(index)
        image = torch.from_numpy(sample["image"]).permute(2, 0, 1) / 255
        with torch.no_grad():
            (answer,) = model([image])
        truth = sample["semantic"].long()
        both += torch.bincount((11 * truth + answer).flatten(), minlength=121).view(11, 11)
    hit = both.diagonal()
    each = hit / (both.sum(0) + both.sum(1) - hit)
    assert one(found.table, "miou", part="dense") == pytest.approx(float(each.nanmean()), abs=1e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foveate.save(dense("detect"), tmp_path / "detect")
    command = ["eval", str(tmp_path / "detect"), "--data", SCENES, "--limit", "2"]
    out = tmp_path / "out"
    assert cli.main([*command, "svit(keep=0.5)", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "box AP" in said and "patches used" in said and "svit(keep=0.5)" in said
    assert {path.name for path in out.iterdir()} == {
        *("eval.json", "eval.csv", "eval.md"),
        *(f"{kind}-ap-macs{end}" for kind in ("box", "mask") for end in (".svg", ".png")),
    }
    assert json.loads((out / "eval.json").read_text())["models"]["detect"]["classes"][0]
    for more, words in (
        (["--occlusion"], "is for classifiers"),
        (["--calibrate", "2"], "has no method with gates"),
        (["dynamicvit(keep=0.5)", "--calibrate", "2"], "a fixed count needs none"),
    ):
        assert cli.main([*command, *more]) == 2
        assert words in capsys.readouterr().err


def test_unreadable_images_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the scores, the multiply-adds and the times; and the strict plan fails."""
    sample = SceneSource.sample

    def torn(self: SceneSource, index: int) -> dict[str, Any]:
        if index == 0:
            raise Unreadable(f"{self.name(index)}: torn")
        return sample(self, index)

    monkeypatch.setattr(SceneSource, "sample", torn)
    plan = Plan(data=SCENES, batch=2, speed=(1,), rounds=3, device="cpu")
    found = evaluate_dense({"mine": dense("segment")}, plan)
    assert one(found.table, "images", part="dense") == 3 and caplog.text.count("torn") == 1
    about = found.about["models"]["mine"]
    assert (about["unreadable"], about["counted images"]) == (1, 3)
    assert one(found.table, "macs", part="dense") > 0
    assert one(found.table, "per_second", part="dense speed") > 0
    with pytest.raises(Unreadable, match="torn"):
        evaluate_dense({"mine": dense("segment")}, dataclasses.replace(plan, strict=True))


def test_masks_need_data_with_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything runs."""
    targets = SceneSource.targets

    def boxes(self: SceneSource, index: int) -> dict[str, Any]:
        return {key: value for key, value in targets(self, index).items() if key != "masks"}

    monkeypatch.setattr(SceneSource, "targets", boxes)
    words = "mine answers with masks, and scenes:.* has boxes without masks: give data with masks"
    told: list[str] = []
    with pytest.raises(ValueError, match=words):
        evaluate_dense(
            {"mine": dense("detect")},
            Plan(data=SCENES, device="cpu"),
            progress=lambda title, done, total: told.append(title),
        )
    assert not told


def test_other_classes_are_refused() -> None:
    model = dense("segment")
    model.class_names = model.class_names[::-1]
    with pytest.raises(ValueError, match="they do not belong together"):
        evaluate_dense({"mine": model}, Plan(data=SCENES, device="cpu"))
