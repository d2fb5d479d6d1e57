"""Detectors and segmenters in a comparison: one dense model, and methods trained from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import Here, compare

from foveate import config
from foveate.measure import Results, one, select
from foveate.measure.cells import make_cells
from foveate.measure.comparison import Comparison

SCENES = "scenes:size=32,train=8,val=4,test=4"
HEADS: dict[str, Any] = {
    "detect": {
        **{"name": "mask_rcnn", "channels": 16, "box_channels": 24, "anchor_scale": 4},
        **{"mask_channels": 16, "mask_layers": 1, "proposals": [40, 30], "detections": 10},
        **{"box_batch_size_per_image": 16, "rpn_batch_size_per_image": 32},
    },
    "segment": {"name": "fpn", "channels": 16},
}
DATA = {
    **{"train": SCENES, "mean": [0.286], "std": [0.353], "batch": 4, "val_batch": 4},
    **{"augment": {"resize": "none"}, "short": None},
}


def write(folder: Path, job: str, **changes: Any) -> Path:
    """One dense model for both seeds, its dense control, and SViT."""
    shared = {"data": DATA, "loop": {"epochs": 1, "check_every": 1, "loggers": []}}
    options = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 4}
    vit = {"name": "vit_tiny_patch16_224", "options": {**options, "num_heads": 2}}
    backbone = {"name": "pyramid", "scales": [1, 0.5], "channels": 16}
    first = {**shared, "model": vit, "backbone": backbone, "head": HEADS[job]}
    (folder / "first.yaml").write_text(yaml.safe_dump(first))
    more = {**shared, "model": {"start": "elsewhere"}}
    (folder / "more.yaml").write_text(yaml.safe_dump(more))
    recipe = {"recipe": str(folder / "more.yaml")}
    tree = {
        "seeds": [3, 4],
        "models": {
            "base": {"job": job, "recipe": str(folder / "first.yaml"), "once": True},
            "dense": {"job": job, **recipe, "start": "base", "seeds": [4]},
        },
        "methods": {
            "svit": {**recipe, "method": "svit(keep=0.5)", "starts": ["base"]},
        },
        "evaluate": {"batch": 2, "calibration": 4},
        **changes,
    }
    path = folder / "dense.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


CELLS = [
    *("models/base", "models/dense/seed4"),
    *("reduced/base/svit/seed3", "reduced/base/svit/seed4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "score"),
    [("detect", "mask_ap"), ("segment", "miou")],
)
def test_methods_from_one_dense_model(
    job: str, score: str, tmp_path: Path, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, job), tmp_path / "out"
    assert compare(path, "--out", out) == 0
    assert here.names == [name + end for name in CELLS for end in ("", "/eval")]
    said = capsys.readouterr().out
    assert "svit calibrated" in said and "missing" not in said
    found = Results.load(out / "report.json").table
    seeds = {
        ("base", ""): [None],
        **{("dense", ""): [4], ("base", "svit"): [3, 4], ("base", "svit calibrated"): [3, 4]},
    }
    judged = select(found, part="dense")
    assert set(zip(judged["run"], judged["method"], strict=True)) == set(seeds)
    for (run, method), those in seeds.items():
        for seed in those:
            keys = {"part": "dense", "run": run, "method": method, "seed": seed}
            assert 0 <= one(found, score, **keys) <= 1
            assert one(found, "images", **keys) == 4
            used = one(found, "usage", **keys)
            assert used == 1 if method == "" else 0 < used <= 1
    # Every training began with the weights of the one dense model, drawing by its own seed.
    for name, seed in (("models/base", 3), ("reduced/base/svit/seed4", 4)):
        recipe = yaml.safe_load((out / name / "recipe.yaml").read_text())
        assert recipe["loop"]["seed"] == seed
        base = recipe["model"]["start"]
        assert base is None or Path(base) == out / "models/base"
    own = Results.load(out / "reduced/base/svit/seed4/eval.json").table
    assert one(found, score, part="dense", run="base", method="svit", seed=4) == one(
        own, score, part="dense", method="svit(keep=0.5)"
    )
    pictures = {path.name for path in out.glob("*.svg")}
    assert f"{score.replace('_', '-')}-macs.svg" in pictures
    # Again: nothing runs, and the report is the same.
    here.names.clear()
    assert compare(path, "--out", out) == 0
    assert here.names == []
    assert Results.load(out / "report.json").table.equals(found)
    assert len(json.loads((out / "report.json").read_text())["cells"]) == 2 * len(CELLS)


def test_methods_from_a_detector_of_another_run(tmp_path: Path) -> None:
    """It is opened, and its job says by which recipes methods are trained from it."""
    (tmp_path / "run").mkdir()
    changes = {"models": {"base": {"job": "detect", "open": str(tmp_path / "run")}}}
    path = write(tmp_path, "detect", data=SCENES, **changes)
    cells = make_cells(config.read(Comparison, path), tmp_path / "out")
    jobs = {name: cell.work.job for name, cell in cells.items()}
    assert jobs["reduced/base/svit/seed3"] == "detect"
    assert jobs["models/base/eval"] == "evaluate" and "models/base" not in cells
    assert cells["reduced/base/svit/seed4"].work.recipe["model"]["start"] == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"occlusion": [0.5]}}, "evaluate.occlusion is for classifiers, which"),
        (
            {"models": {"base": {"job": "detect", "recipe": "scenes", "once": True, "seeds": [0]}}},
            "once=true trains with one seed: leave seeds out",
        ),
    ],
)
def test_what_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "detect", **changes)
    assert compare(path, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
