"""Detection and segmentation on the engine: what is trained, saved, resumed, and refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from runs import checkpoint, elsewhere, exported, run, same_run, together
from torch import nn

import foveate
from foveate import config
from foveate.data import open_source
from foveate.data.sources.base import OBJECTS, PIXELS
from foveate.dense import DenseModel
from foveate.train.dense_recipe import Detect, Segment
from foveate.train.detect import DetectTask, make_detect
from foveate.train.optim import parameter_groups
from foveate.train.segment import make_segment
from foveate.train.splits import open_data

SCENES = "scenes:size=32,train=16,val=6,test=4"
TREE: dict[str, Any] = {
    "model": {},
    "data": {
        **{"train": SCENES, "mean": [0.286], "std": [0.353], "batch": 4, "val_batch": 4},
        **{"augment": {"resize": "none"}, "short": None},
    },
    "backbone": {"name": "pyramid", "scales": [1, 0.5], "channels": 16},
    "optim": {"lr": 1e-3, "clip": 1.0},
    "loop": {"epochs": 1, "log_every": 1, "loggers": []},
}
BOXES = {
    **{"channels": 16, "box_channels": 24, "anchor_scale": 4, "proposals": [40, 30]},
    **{"detections": 10, "box_batch_size_per_image": 16, "rpn_batch_size_per_image": 32},
}
HEADS: dict[str, Any] = {
    "detect": {"name": "mask_rcnn", **BOXES, "mask_channels": 16, "mask_layers": 1},
    "segment": {"name": "fpn", "channels": 16},
}
JOBS: dict[str, type] = {"detect": Detect, "segment": Segment}


def recipe(job: str, start: str, *overrides: str, **parts: Any) -> Any:
    """Four updates of four scenes of 32 pixels, on a ViT of three blocks."""
    tree = {**TREE, "head": HEADS[job], "model": {"start": start}, **parts}
    return config.parse(JOBS[job], tree, overrides)


def going_on(job: str, start: str, *overrides: str) -> Any:
    """The same from a dense model."""
    tree = {k: v for k, v in TREE.items() if k != "backbone"}
    return config.parse(JOBS[job], {**tree, "model": {"start": start}}, overrides)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    return checkpoint(path, patch_size=4, in_chans=1)


@pytest.fixture(scope="module")
def dense(vit: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("dense")
    return {job: run(recipe(job, vit), root / job) for job in JOBS}


@pytest.fixture(scope="module")
def svit(dense: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sparse fine-tuning of the dense detector, killed by nobody."""
    out = tmp_path_factory.mktemp("svit") / "run"
    made = going_on("detect", str(dense["detect"].path), "method=svit(keep=0.7)", *RESUMED)
    return made, run(made, out)


RESUMED = (
    *("loop.save_every=1", "loop.statistics=true", "loop.epochs=2", "loop.ema=0.5"),
    "loop.pictures_every=2",
)


def scenes(job: str) -> list[torch.Tensor]:
    source = open_source(SCENES, "test")
    return [torch.from_numpy(source.image(i)).permute(2, 0, 1) / 255 for i in range(4)]


@pytest.mark.parametrize("job", list(JOBS))
def test_a_dense_run_says_what_it_reached_and_opens_again(job: str, dense: dict[str, Any]) -> None:
    result = dense[job]
    names = {"detect": ("box_ap", "mask_ap"), "segment": ("miou",)}[job]
    assert result["score"] == names[0] and all(0 <= result[name] <= 1 for name in names)
    losses = {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}
    losses = losses if job == "detect" else {"segment"}
    columns = {c.removeprefix("train/") for c in result.history if c.startswith("train/")}
    assert columns == losses | {"loss"}
    model = foveate.load(result.path)
    assert isinstance(model, DenseModel) and not model.training
    assert len(model.class_names) == {"detect": 10, "segment": 11}[job]
    assert model.reducer.name == "dense"
    card = ModelCard((result.path / "model" / "README.md").read_text(encoding="utf-8"))
    scores = {one.metric_value for one in card.data.eval_results}
    assert scores == {result[name] for name in names} and f"made by `foveate {job}`: " in card.text
    with torch.no_grad():
        one, other = result.model(scenes(job)), model(scenes(job))
    for mine, its in zip(one, other, strict=True):
        pairs = [(mine, its)] if job == "segment" else [(mine[k], its[k]) for k in its]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_detector_without_masks_reads_none(vit: str) -> None:
    """So objects that have none are not left out."""
    for name, reads in (("faster_rcnn", False), ("mask_rcnn", True)):
        made = recipe("detect", vit, head={**BOXES, "name": name})
        splits = open_data(made.data, labels_of=OBJECTS)
        found = make_detect(made, splits).read(splits)
        for source in (found.train, found.val):
            assert ("masks" in source.targets(0)) == reads


def test_a_class_token_and_what_dropped_patches_show(tmp_path: Path) -> None:
    """EViT on a segmenter without a class token: a new one learns, and maps show zeros."""
    path = checkpoint(
        tmp_path / "vit.safetensors",
        **{"patch_size": 4, "in_chans": 1, "class_token": False, "global_pool": "avg"},
    )
    first = run(recipe("segment", path), tmp_path / "dense").model
    assert not first.reduced.backbone.spec.class_token and first.backbone.gone == "last"
    more = ["method=evit(keep=0.5)", "class_token=true", "gone=zero", "loop.max_steps=1"]
    found = run(going_on("segment", str(tmp_path / "dense"), *more), tmp_path / "evit").model
    assert found.reduced.backbone.spec.class_token and found.backbone.gone == "zero"
    before, after = first.state_dict(), found.state_dict()
    (token,) = [name for name in after if name not in before]
    assert token.endswith("cls_token")
    assert max((after[name] - before[name]).abs().max() for name in before) < 0.01
    again = foveate.load(tmp_path / "evit")
    assert again.backbone.gone == "zero" and torch.equal(again.state_dict()[token], after[token])


def test_gates_may_learn_faster(dense: dict[str, Any]) -> None:
    made = going_on("detect", str(dense["detect"].path), "method=svit", "optim.method_scale=20")
    task = make_detect(made, open_data(made.data, labels_of=OBJECTS))
    groups = parameter_groups(task, made.optim)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in task.model.named_parameters():
        if id(parameter) in scales:
            assert scales[id(parameter)] == (20 if "reducer" in name else 1), name
    assert 20 in scales.values()


@pytest.mark.parametrize("job", list(JOBS))
def test_level_embeddings_have_no_weight_decay(job: str, vit: str) -> None:
    """The adapter names them, whatever holds the adapter."""
    backbone = {"name": "adapter", "interactions": 3, "stem": 8}
    made = recipe(job, vit, "optim.weight_decay=0.1", backbone=backbone)
    make, labels_of = {"detect": (make_detect, OBJECTS), "segment": (make_segment, PIXELS)}[job]
    task: Any = make(made, open_data(made.data, labels_of=labels_of))
    groups = parameter_groups(task, made.optim)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(task.model.named_parameters())
    exempt = task.model.no_weight_decay() & named.keys()
    ends = {name.rpartition(".")[2] for name in exempt}
    assert ends == {"level_embed", "pos_embed", "cls_token"}
    assert all(decay[id(named[name])] == 0 for name in exempt)
    adapter = task.model.trunk
    assert decay[id(adapter.level_embed)] == 0 and decay[id(adapter.up.weight)] == 0.1


def test_what_no_map_depends_on_is_not_trained(vit: str, dense: dict[str, Any]) -> None:
    before, after = foveate.load(vit), dense["detect"].model.reduced.vit
    assert torch.equal(before.norm.weight, after.norm.weight)
    assert after.num_classes == 0 and not after.norm.weight.requires_grad
    assert not torch.equal(before.blocks[0].mlp.fc1.weight, after.blocks[0].mlp.fc1.weight)


def test_sparse_fine_tuning_goes_on_from_the_dense_detector(
    svit: Any, dense: dict[str, Any]
) -> None:
    _, result = svit
    model = foveate.load(result.path)
    assert model.reducer.name == "svit" and model.settings == dense["detect"].model.settings
    assert {"train/ratio", "tokens/block02"} <= set(result.history)
    assert len(list((result.path / "pictures/epoch-002").iterdir())) == 4
    far = [
        (value - dense["detect"].model.state_dict()[name]).abs().max()
        for name, value in model.state_dict().items()
        if "reducer" not in name
    ]
    assert 0 < max(far) < 0.05  # near the start: eight small steps
    about = json.loads((result.path / "model/dense.json").read_text())
    assert about["methods"][0]["name"] == "svit"
    again = foveate.unwrap(model)
    assert again.reducer.name == "dense" and again.class_names == model.class_names


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(svit: Any, tmp_path: Path) -> None:
    made, whole = svit
    assert elsewhere(made, tmp_path / "run", kill="1,1") == -signal.SIGKILL
    assert elsewhere(made, tmp_path / "run", resume=True) == 0
    assert same_run(whole.path, tmp_path / "run")


@pytest.mark.slow
def test_two_processes(vit: str, tmp_path: Path) -> None:
    """Both jobs equal one process with the doubled batch, on images of different sizes."""
    more: dict[str, Any] = {
        "optim": {"name": "sgd", "lr": 0.05, "clip": 1.0},
        "data": {**TREE["data"], "augment": {"resize": "short", "short": [24, 32], "long": 48}},
    }
    jobs = []
    for job in JOBS:
        file = tmp_path / f"{job}.yaml"
        file.write_text(config.dump(recipe(job, vit, "data.batch=2", **more)))
        jobs.append([job, str(file), "--out", str(tmp_path / f"{job}-two")])
    assert together(jobs, tmp_path) == [0, 0]
    for job in JOBS:
        one = run(recipe(job, vit, **more), tmp_path / f"{job}-one")
        a, b = exported(tmp_path / f"{job}-one"), exported(tmp_path / f"{job}-two")
        far = {name: float((a[name] - b[name]).abs().max()) for name in a}
        assert max(far.values()) < 1e-5, (job, far)
        two = json.loads((tmp_path / f"{job}-two/result.json").read_text())
        scores = {"detect": ("box_ap", "mask_ap"), "segment": ("miou",)}[job]
        for name in scores:
            assert two[name] == pytest.approx(one[name], abs=1e-3), name
    two = json.loads((tmp_path / "detect-two/result.json").read_text())
    task = DetectTask(foveate.load(tmp_path / "detect-two"))
    metrics, source = task.metrics(), open_source(SCENES, "val")
    _, prepare = task.transforms()
    batch = task.collate([prepare(source.sample(i)) for i in range(len(source))])
    with torch.no_grad():
        task.validation_step(task.model.eval(), batch, metrics, 0)
    for name, metric in metrics.items():
        assert two[name] == pytest.approx(float(metric.compute()), abs=1e-3)


def test_other_classes_get_new_outputs(dense: dict[str, Any], tmp_path: Path) -> None:
    found = foveate.load(dense["detect"].path)
    found.class_names = found.class_names[:9] + ("hat",)
    foveate.save(found, tmp_path / "hats")
    start = str(tmp_path / "hats")
    with pytest.raises(ValueError, match="hats has 10 classes .*model.new_head=true"):
        run(going_on("detect", start), tmp_path / "run")
    made = going_on("detect", start, "model.new_head=true", "loop.max_steps=1")
    assert run(made, tmp_path / "run").model.class_names[-1] == "ankle boot"


@pytest.mark.parametrize("job", list(JOBS))
def test_a_start_of_another_job_is_refused(job: str, dense: Any, tmp_path: Path) -> None:
    (other,) = set(JOBS) - {job}
    made = going_on(job, str(dense[other].path), "model.new_head=true")
    has = HEADS[other]["name"]
    with pytest.raises(ValueError, match=f"has the head {has}, and this job trains .*: start from"):
        run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_losses(dense: dict[str, Any], vit: str) -> None:
    model = foveate.apply(foveate.load(dense["detect"].path), "svit", check=False)
    task = DetectTask(model, weights={"mask": 2.0, "ratio": 8.0})
    assert task.weights == {"mask": 2.0} and model.reducer.loss_weights == {"ratio": 8.0}
    with pytest.raises(ValueError, match="'rato'.*did you mean 'ratio'"):
        DetectTask(model, weights={"rato": 1.0})


def test_a_model_of_ones_own(vit: str, tmp_path: Path) -> None:
    own: nn.Module = foveate.load(vit)
    result = foveate.segment(
        own,
        TREE["data"],
        backbone=TREE["backbone"],
        head=HEADS["segment"],
        loop={**TREE["loop"], "max_steps": 1},
        out=tmp_path / "run",
        progress=False,
        say=lambda _: None,
    )
    assert result.model.reduced.vit is own and result["updates"] == 1


@pytest.mark.parametrize(
    ("job", "overrides", "words"),
    [
        ("detect", ["backbone.name=pyramide"], "backbone.name.*did you mean 'pyramid'"),
        ("detect", ["backbone.scale=4"], "option of backbone.name=pyramid.*'scales'"),
        ("detect", ["head.name=fpn"], "head.name"),
        ("segment", ["head.box_channels=4"], "option of head.name=fpn"),
        ("detect", ["data.short=64", "data.long=32"], "data.long must be at least 64"),
        ("detect", ["weights.mask=-1"], "weights.mask must be at least 0"),
        ("detect", ["data.train=fashion-mnist"], "has labels of whole images; .* of objects"),
        ("segment", ["method=svt"], "did you mean 'svit'"),
        ("segment", ["loop.strategy=fsdp"], "fsdp is not for detectors"),
        ("segment", ["data.mean=[0.5, 0.5]"], "each of the model's 1 channels"),
    ],
)
def test_what_is_refused(
    job: str, overrides: list[str], words: str, vit: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        run(recipe(job, vit, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_backbone_than_the_starts_is_refused(dense: dict[str, Any], tmp_path: Path) -> None:
    made = going_on("detect", str(dense["detect"].path), "backbone.name=adapter")
    with pytest.raises(ValueError, match="has backbone .*pyramid.*leave backbone out"):
        run(made, tmp_path / "run")


def test_a_broken_first_validation_map_is_skipped(
    vit: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw = np.random.RandomState(0)
    for split in ("train", "val"):
        images, maps = tmp_path / "data/images" / split, tmp_path / "data/masks" / split
        for folder in (images, maps):
            folder.mkdir(parents=True)
        for name in "abcd":
            values = draw.randint(0, 256, (2, 32, 32)).astype(np.uint8)
            Image.fromarray(values[0]).save(images / f"{name}.png")
            Image.fromarray(values[1] % 3).save(maps / f"{name}.png")
    data = {**TREE["data"], "train": f"masks:{tmp_path / 'data'}"}
    (tmp_path / "data/masks/val/a.png").write_bytes(b"torn")
    made = recipe("segment", vit, "loop.max_steps=1", data=data)
    assert run(made, tmp_path / "run")["images"]["unreadable"] == 1
    assert "skipped" in caplog.text and "a.png" in caplog.text
    for name in "bcd":
        (tmp_path / f"data/masks/val/{name}.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="none of the 4 validation .* has an object that can be"):
        run(made, tmp_path / "none")


def test_validation_images_without_objects_are_refused(
    vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.data.sources import SceneSource

    targets = SceneSource.targets

    def empty(self: SceneSource, index: int) -> dict[str, Any]:
        found = targets(self, index)
        nothing = {k: found[k][:0] for k in ("boxes", "labels", "masks")}
        return {"image_id": found["image_id"], **nothing}

    monkeypatch.setattr(SceneSource, "targets", empty)
    with pytest.raises(ValueError, match="none of the 6 validation images .* has an object"):
        run(recipe("detect", vit), tmp_path / "run")
