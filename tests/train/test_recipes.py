"""Every recipe that ships: readable, written back as it is, and good for two updates."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from runs import checkpoint, exported, run

import foveate
from foveate import config
from foveate.backbones import lvvit_s
from foveate.convert import save_plain
from foveate.data import CLASSES
from foveate.data.scenes import PIXEL_CLASSES
from foveate.dense import make_dense
from foveate.train import recipe as recipes
from foveate.train.dense_recipe import DenseRecipe, Detect, Segment
from foveate.train.logs import read_metrics
from foveate.train.probe import probe

JOBS: dict[str, type] = {
    "adapt": recipes.Adapt,
    "finetune": recipes.Finetune,
    "reduce": recipes.Reduce,
    "probe": recipes.Probe,
    "detect": Detect,
    "segment": Segment,
}
ALL = [(job, name) for job in JOBS for name in config.list_recipes(job)]


def opened(job: str, name: str) -> Any:
    return config.read(JOBS[job], config.find_recipe(job, name))


@pytest.mark.parametrize(("job", "name"), ALL)
def test_a_recipe_is_written_as_it_is_read(job: str, name: str) -> None:
    recipe = opened(job, name)
    again = config.parse(JOBS[job], yaml.safe_load(config.dump(recipe)))
    assert again == recipe and config.dump(again) == config.dump(recipe)
    assert len(config.headers(job)[name]) > 20
    assert f"foveate {job} {name}" in config.find_recipe(job, name).read_text()


SMALL = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


@lru_cache
def start(folder: Path, channels: int, family: str) -> str:
    """Weights that stand in for those that a recipe starts with or is taught by."""
    path = folder / f"start-{channels}-{family}.safetensors"
    if family == "vit":
        return checkpoint(path, **SMALL, in_chans=channels)
    torch.manual_seed(0)
    if family == "lvvit":
        save_plain(lvvit_s(**SMALL, in_chans=channels, num_classes=10), path)
    else:  # as pre-training leaves it: without a head
        options = {"init_values": 0.1, "in_chans": channels, "num_classes": 0}
        beit = timm.create_model("beit_base_patch16_224", global_pool="token", **SMALL, **options)
        save_plain(beit, path)
    return str(path)


SMALL_HEADS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {
        **{"channels": 16, "box_channels": 24, "mask_channels": 16, "proposals": [20, 20]},
        **{"detections": 10, "box_batch_size_per_image": 16},
    },
    "fpn": {"channels": 16},
    "upernet": {"channels": 16},
}


def small_scenes(data: Any) -> Any:
    """Scenes of 32 pixels in place of a recipe's data, prepared as it has them, but small."""
    colour = "false" if data.mean else "true"
    augment = dataclasses.replace(
        data.augment, short=(32, 40), long=48, crop=data.augment.crop and (32, 40)
    )
    return dataclasses.replace(
        data,
        train=f"scenes:size=32,train=16,val=8,test=2,colour={colour}",
        augment=augment,
        batch=4,
        val_batch=4,
        short=data.short and 32,
        long=48,
    )


@lru_cache
def dense_start(folder: Path, job: str, weights: str) -> str:
    """A detector or a segmenter that stands in for one of an earlier run."""
    names = CLASSES if job == "detect" else PIXEL_CLASSES
    name = "mask_rcnn" if job == "detect" else "fpn"
    backbone, head = {"name": "pyramid", "channels": 16}, {"name": name, **SMALL_HEADS[name]}
    made = make_dense(foveate.load(weights), names, backbone, head, None)
    path = folder / f"dense-{job}-{Path(weights).stem}"
    foveate.save(made, path)
    return str(path)


def shrunk(recipe: Any, folder: Path) -> Any:
    """The recipe as it is, on a small model and a few of the images that ship."""
    model, named = recipe.model, f"{recipe.model.name}{recipe.model.start}"
    family = next((one for one in ("lvvit", "beit") if one in named), "vit")
    channels = len(recipe.data.mean or (0, 0, 0))
    weights = start(folder, channels, family)
    options = {}
    if model.name is not None:
        options = {**model.options, **SMALL, "in_chans": channels}
        if model.multiscale is not None:  # 7 x 7 patches have no half
            options["patch_size"] = 7
    changes: dict[str, Any] = {
        "model": dataclasses.replace(
            model, options=options, start=None if model.start is None else weights
        ),
        "data": dataclasses.replace(
            recipe.data,
            **{"train": "fashion-mnist", "batch": 8, "val_batch": 8, "workers": 0},
            **{"limit": 16, "val_limit": 8},
        ),
    }
    if isinstance(recipe, DenseRecipe):
        changes["data"] = small_scenes(changes["data"])
        if recipe.head is not None:
            changes["head"] = {**recipe.head, **SMALL_HEADS[recipe.head["name"]]}
        if recipe.backbone is None:  # it goes on with the model of an earlier run
            kind = "detect" if isinstance(recipe, Detect) else "segment"
            changes["model"] = dataclasses.replace(model, start=dense_start(folder, kind, weights))
    if isinstance(recipe, recipes.Probe):
        depth = recipe.depth and SMALL["depth"] - 1
        return dataclasses.replace(recipe, **changes, epochs=2, neighbours=3, depth=depth)
    loop = dataclasses.replace(recipe.loop, max_steps=2, log_every=1, loggers=())
    if isinstance(recipe, DenseRecipe):  # bf16 is emulated on many CPUs: a minute an update
        loop = dataclasses.replace(loop, precision="32")
    if isinstance(recipe, recipes.Finetune) and recipe.distill.teacher is not None:
        changes["distill"] = dataclasses.replace(recipe.distill, teacher=weights)
    if isinstance(recipe, recipes.Reduce) and recipe.teacher is not None:
        changes["teacher"] = weights
    if getattr(recipe, "budget", None) is not None:  # of a model that takes longer than this one
        changes["budget"] = "80%"
    return dataclasses.replace(recipe, **changes, loop=loop)


# Like others but for the method, the size or the start: their files are read above all the same.
ALIKE = {
    *("imagenet_deit_b_dynamicvit", "imagenet_mae_b_dynamicvit", "imagenet_deit_s_tome_scratch"),
    *("imagenet_deit_s_evit_scratch", "imagenet_deit_s_evovit_scratch", "imagenet_deit_b"),
    *("imagenet_deit_b_masked_scratch", "imagenet_mae_b_full", "imagenet_deit_s_svit"),
    *("imagenet_deit_s_spvit", "imagenet_deit_s_static", "imagenet_deit_s_ats", "demo_static"),
    *("imagenet_deit_s_tokenmergence_scratch", "cifar10_dynamicvit", "fashion_dynamicvit"),
    *("coco_adapter_t", "coco_adapter_t_svit", "ade20k_adapter_s_svit", "demo_svit"),
    *("cifar10_full", "cifar10_masked", "demo_base", "demo_masked", "fashion_full"),
    *("fashion_masked", "demo_spvit", "imagenet_deit_s_cropr", "imagenet_simmim_b_mto_paper"),
    *("imagenet_mae_b_repo", "imagenet_mae_b_mto_paper", "imagenet_bootmae_b_mto_paper"),
    *("imagenet_conmim_b_repo", "imagenet_conmim_b_mto_paper", "imagenet_mae_b"),
}
RUN = [
    pytest.param(job, name, marks=pytest.mark.slow if name in ALIKE else ()) for job, name in ALL
]


@pytest.mark.parametrize(("job", "name"), RUN)
def test_a_recipe_runs(
    job: str, name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = opened(job, name)
    recipe = shrunk(whole, tmp_path_factory.getbasetemp())
    if job == "probe":
        result = probe(recipe, tmp_path)
        assert result["accuracy"] == result["linear"] and result["images"] == {
            "train": 16,
            "test": 8,
        }
        return
    for part in ("optim", "mix", "method", "masking", "weights", "backbone"):
        assert getattr(recipe, part, None) == getattr(whole, part, None)
    result = run(recipe, tmp_path)
    assert result["updates"] == 2 and result["images"]["val"] == 8
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "train/loss" in row]
    if isinstance(recipe, DenseRecipe):
        assert len(rows) == 2 and 0 <= result[result["score"]] <= 1
        assert all(bool(value.isfinite().all()) for value in exported(tmp_path).values())
        return
    if job == "adapt":
        assert len(rows) == 2 and all(0 < float(row["train/patches"]) < 1 for row in rows)
        return
    # Ten classes, which an untrained head does not tell apart: ln 10 is 2.3.
    assert len(rows) == 2 and all(1.5 < float(row["train/class"]) < 4 for row in rows)
    assert all(bool(value.isfinite().all()) for value in exported(tmp_path).values())
