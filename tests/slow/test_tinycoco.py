"""The paper's recipe at full size, on a few photographs of COCO where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate import config
from foveate.measure import Plan, evaluate_dense, one
from foveate.train.dense_recipe import Detect
from foveate.train.detect import detect

pytestmark = pytest.mark.slow

TINY = Path(os.environ.get("FOVEATE_TINYCOCO", Path(__file__).parents[3] / "shared/data/tinycoco"))


@pytest.mark.skipif(not TINY.is_dir(), reason=f"no photographs at {TINY}")
def test_two_updates_of_both_stages(tmp_path: Path) -> None:
    """ViT-Adapter-T at 800 px, dense and then with SViT; the weights are random."""
    data = {"train": f"coco:{TINY}", "val_share": 0.2, "batch": 1, "val_limit": 1}
    loop = {"precision": "32", "loggers": [], "log_every": 1, "max_steps": 2, "epochs": 1}
    model: dict[str, Any] = {"start": None, "checkpointing": True}

    def stage(name: str, **parts: Any) -> Any:
        tree = config.load(config.find_recipe("detect", name))
        for group, changes in {"data": data, "loop": loop, **parts}.items():
            tree[group] = {**tree[group], **changes}
        tree["backbone"] = tree.get("backbone") and {**tree["backbone"], "norm": "layer"}
        return config.parse(Detect, tree)

    dense = detect(stage("coco_adapter_t", model=model), tmp_path / "dense", progress=False)
    assert dense["updates"] == 2 and 0 <= dense["box_ap"] <= 1
    start = {"start": str(tmp_path / "dense"), "checkpointing": True}
    made = stage("coco_adapter_t_svit", model=start)
    sparse = detect(made, tmp_path / "svit", progress=False)
    assert sparse.history["train/ratio"].notna().sum() == 2
    found = evaluate_dense(
        {"svit": foveate.load(tmp_path / "svit")},
        Plan(data=data["train"], split="val", val_share=0.2, batch=1, limit=1, device="cpu"),
    )
    macs = {
        method: one(found.table, "backbone_macs", part="dense", method=method)
        for method in ("", "svit(keep=0.7)")
    }
    assert macs["svit(keep=0.7)"] < macs[""] > 50e9
