"""Each job learns on images that ship: far above chance, on images that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DATA, LOOP, MODEL

import foveate
from foveate.data import device_batches, eval_transform, limited, open_images
from foveate.data.loader import Loader

QUIET: dict[str, Any] = {"progress": False, "say": lambda _: None}
IMAGES = {**DATA, "batch": 50, "val_batch": 250, "limit": 500, "val_limit": 250}
WARM = {"lr": 8e-3, "warmup_epochs": 1, "clip": 1.0}
CHANCE = 10.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight epochs on 500 images, from scratch."""
    out = tmp_path_factory.mktemp("base") / "run"
    loop = {**LOOP, "epochs": 8, "check_every": 8}
    return foveate.finetune(dict(MODEL), IMAGES, optim=WARM, loop=loop, out=out, **QUIET)


def test_finetune(base: Any) -> None:
    assert base["accuracy"] > CHANCE + 25
    losses = base.history["train/loss"].dropna()
    assert losses.iloc[-10:].mean() < 0.85 * losses.iloc[:10].mean()
    # What was exported is as good, counted here.
    batches = Loader(
        limited(open_images("fashion-mnist", "val"), 250, balanced=False),
        eval_transform((28, 28), 1),
        **{"batch": 250, "train": False},
    )
    model, right = foveate.load(base.path).eval(), 0
    with torch.no_grad():
        for images, labels, _ in device_batches(batches, (0.286,), (0.353,), "cpu"):
            right += int((model(images).argmax(1) == labels).sum())
    assert base["accuracy"] == pytest.approx(right / 2.5, abs=0.01)


def test_masked_finetuning(base: Any, tmp_path: Path) -> None:
    """Half of the patches hidden: the base loses more than what was trained for it."""
    done = foveate.finetune(
        base.path,
        IMAGES,
        masking={"ratios": [0.5, 0.75]},
        optim={"lr": 5e-3, "clip": 1.0},
        loop={**LOOP, "epochs": 8, "check_every": 8},
        out=tmp_path / "masked",
        **QUIET,
    )
    assert done["accuracy"] > CHANCE + 20
    asked: dict[str, Any] = {"split": "val", "occlusion": (0.75,), "limit": 250, "device": "cpu"}
    models = {"base": base.path, "masked": done.path}
    table = foveate.evaluate(models, "fashion-mnist", **asked).table
    means = table[(table["part"] == "occlusion") & (table["metric"] == "top1")]
    means = means.groupby("run")["value"].mean()
    assert means["masked"] > means["base"] + 3


def test_reduce(base: Any, tmp_path: Path) -> None:
    """With a third of the tokens left at the end it becomes better than it was with all."""
    done = foveate.reduce(
        base.path,
        "evit(keep=0.7)",
        IMAGES,
        optim=WARM,
        loop={**LOOP, "epochs": 8, "check_every": 8},
        out=tmp_path / "reduced",
        **QUIET,
    )
    assert done["accuracy"] > base["accuracy"] + 5 and done["accuracy"] > CHANCE + 30


def test_pretrain_and_probe(tmp_path: Path) -> None:
    """Hidden patches are predicted better than by their mean, which has a loss of one."""
    done = foveate.pretrain(
        dict(MODEL),
        {**IMAGES, "limit": 1000},
        options={"decoder_width": 32, "decoder_depth": 1, "norm_pix": True},
        optim={"lr": 5e-3, "warmup_epochs": 1},
        loop={**LOOP, "epochs": 6, "check_every": 6},
        out=tmp_path / "mae",
        **QUIET,
    )
    assert done["loss"] < 0.9
    read = foveate.probe(
        done.path,
        IMAGES,
        feature="avg",
        neighbours=10,
        epochs=200,
        batch=50,
        lr=20.0,
        out=tmp_path / "read",
    )
    assert read["knn"] > CHANCE + 25 and read["linear"] > CHANCE + 25


DENSE: dict[str, Any] = {
    "backbone": {"name": "pyramid", "scales": [1, 0.5], "channels": 32},
    "optim": {"lr": 2e-3, "clip": 1.0, "warmup_share": 0.1},
    "loop": {**LOOP, "epochs": 1},
}


def scenes(size: int) -> dict[str, Any]:
    """Scenes without clutter: as many as 200 updates take, and some to validate on."""
    return {
        **{"train": f"scenes:size={size},train=1600,val=100,clutter=0", "batch": 8},
        **{"val_batch": 20, "mean": [0.286], "std": [0.353]},
        **{"augment": {"resize": "none"}, "short": None},
    }


@pytest.mark.slow
def test_detect(tmp_path: Path) -> None:
    """An untrained detector has an average precision below 0.001; here it was 0.058."""
    head: dict[str, Any] = {
        **{"name": "faster_rcnn", "channels": 32, "box_channels": 64, "anchor_scale": 4},
        **{"proposals": [60, 40], "detections": 10},
        **{"box_batch_size_per_image": 32, "rpn_batch_size_per_image": 64},
    }
    done = foveate.detect("demo", scenes(48), head=head, **DENSE, out=tmp_path / "run", **QUIET)
    assert done["box_ap"] > 0.025
    losses = done.history["train/loss"].dropna()
    assert losses.iloc[-20:].mean() < 0.8 * losses.iloc[:20].mean()


@pytest.mark.slow
def test_segment(tmp_path: Path) -> None:
    """Calling all pixels background reaches at most a mean IoU of 1/11; here it was 0.13."""
    head = {"name": "fpn", "channels": 32}
    done = foveate.segment("demo", scenes(64), head=head, **DENSE, out=tmp_path / "run", **QUIET)
    assert done["miou"] > 0.11
    losses = done.history["train/loss"].dropna()
    assert losses.iloc[-20:].mean() < 0.8 * losses.iloc[:20].mean()


def test_predict_says_what_was_learnt(base: Any) -> None:
    from PIL import Image

    source = open_images("fashion-mnist", "test")
    pictures = [Image.fromarray(source.image(i)[..., 0]) for i in range(0, 2000, 20)]
    found = foveate.predict(base.path, pictures, top=1, device="cpu")
    names = source.classes or ()
    right = sum(record.labels[0] == names[source.label(20 * i)] for i, record in enumerate(found))
    assert right > 25  # of 100; the labels are the names of the set's classes
