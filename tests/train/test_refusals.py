"""What is wrong is said in one sentence, before the first step where that is possible."""

from __future__ import annotations

import errno
import importlib
import logging
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback
from runs import checkpoint, exported, finetune, reduce, run, small_model
from torch import Tensor

import foveate
from foveate.train import recipe as recipes
from foveate.train.build import make_finetune, make_reduce
from foveate.train.finetune import FinetuneTask
from foveate.train.logs import read_metrics
from foveate.train.models import make_model
from foveate.train.module import Module
from foveate.train.run import make_loaders
from foveate.train.splits import open_data


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training must not begin."""

    def begun(*_: Any) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(Module, "training_step", begun)


def refused(recipe: Any, out: Path, words: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=words) as error:
        run(recipe, out, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_run_that_is_stopped_says_so(
    kind: signal.Signals,
    ending: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lightning would end with 0, and what comes next would take the run for done."""
    original, steps = FinetuneTask.training_step, iter(range(1000))

    def forward(self: FinetuneTask, *arguments: Any) -> dict[str, Tensor]:
        if next(steps) == 2:
            os.kill(os.getpid(), kind)
        return original(self, *arguments)

    monkeypatch.setattr(FinetuneTask, "training_step", forward)
    # A shell's background job ignores Ctrl-C, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    other = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # libraries that other tests use set one
    try:
        with pytest.raises(ending) as stop:
            run(finetune("loop.epochs=5", "loop.save_every=1"), tmp_path / "run")
        # Lightning's trainer would leave it ignored, in a notebook for good.
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, other)
        signal.signal(signal.SIGINT, before)
    assert getattr(stop.value, "code", 143) == 143
    assert f"stopped; --resume {tmp_path / 'run'} goes on from the last check" in caplog.text
    assert not (tmp_path / "run" / "result.json").exists() and saved(tmp_path / "run")


def test_a_callback_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own error comes through, and the run goes on as if nothing had been."""

    class Broken(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise KeyError("no such column")

    recipe = finetune("loop.save_every=1", "loop.epochs=1")
    own = importlib.import_module("foveate.train.run").method_callbacks
    with monkeypatch.context() as patch:
        patch.setattr("foveate.train.run.method_callbacks", lambda *a: [*own(*a), Broken()])
        with pytest.raises(KeyError, match="no such column"):
            run(recipe, tmp_path / "cut")
    said = f"ended by KeyError; once mended, --resume {tmp_path / 'cut'} goes on from the last"
    assert said in caplog.text and saved(tmp_path / "cut") == [1, 2]
    assert run(recipe, tmp_path / "cut", resume=True)["updates"] == 4
    run(recipe, tmp_path / "whole")
    found, wanted = (exported(tmp_path / name) for name in ("cut", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            RuntimeError("[enforce fail at writer.cc] pos"),
            r"writing update-00000002.ckpt failed \(.*",
        ),
    ],
)
def test_a_disk_that_is_full(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before is whole, nothing of the one that failed stays, and the run goes on."""
    original, written = torch.save, iter(range(1000))

    def save(content: Any, path: str) -> None:
        original(content, path)
        if next(written) == 1:
            raise error

    recipe = finetune("loop.save_every=1", "loop.epochs=1", "loop.keep_last=9")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        words = (
            f"{tmp_path} cannot be written to: {reason}; once that is mended, --resume {tmp_path} "
        )
        with pytest.raises(OSError, match=words):
            run(recipe, tmp_path)
    assert saved(tmp_path) == [1] and not list(tmp_path.rglob("*.partial"))
    assert run(recipe, tmp_path, resume=True)["updates"] == 4


# Numbers that are none ---------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> None:
    """From one step on, the loss "class" is no number, or its gradient is none."""
    original, steps = FinetuneTask.training_step, iter(range(1000))

    def forward(self: FinetuneTask, *arguments: Any) -> dict[str, Tensor]:
        losses = original(self, *arguments)
        if next(steps) >= at:
            zero = losses["class"] * 0
            losses["class"] = losses["class"] + (zero.sqrt() if how == "gradient" else float(how))
        return losses

    monkeypatch.setattr(FinetuneTask, "training_step", forward)


def saved(out: Path) -> list[int]:
    return sorted(int(path.stem[-8:]) for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, value)
    recipe = finetune("loop.save_every=1", "loop.keep_last=9", "loop.log_every=4", "optim.lr=0.25")
    rate = 0.25 * 0.5 * (1 + math.cos(math.pi * 3 / 8))
    words = f"the loss 'class' is {value} at update 3, with learning rate {rate:.3g}: lower"
    refused(recipe, tmp_path, words)
    assert saved(tmp_path) == [1, 2, 3]
    assert not (tmp_path / "result.json").exists()


def test_a_late_look_saves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where losses are looked at every so many steps."""
    spoil(monkeypatch, 3, "nan")

    def collect(self: Module, losses: dict[str, Tensor], loss: Tensor) -> None:
        values = torch.stack([*(v.detach() for v in losses.values()), loss.detach()])
        names = [*(f"the loss {name!r}" for name in losses), "the sum"]
        self._unchecked.append((self.trainer.global_step, self._rate, names, values))

    monkeypatch.setattr(Module, "_watch", collect)
    recipe = finetune("loop.save_every=2", "loop.keep_last=9")
    refused(recipe, tmp_path, "the loss 'class' is nan at update 3")
    assert saved(tmp_path) == [2]


def test_a_gradient_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite, and what the update makes of the weights is not."""
    spoil(monkeypatch, 2, "gradient")
    recipe = finetune("loop.save_every=1", "loop.keep_last=9")
    refused(recipe, tmp_path, r"the weights \w.* contain NaN or infinity after update 2, with l")
    assert saved(tmp_path) == [1, 2]


def test_a_validation_loss_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One image of 32 is enough, in the first of two evaluations; those weights are not best."""
    original = FinetuneTask.validation_step

    def step(self: Any, model: Any, batch: Any, metrics: Any, number: int) -> None:
        if model.training is False and not spoilt:
            spoilt.append(number)
            batch = {**batch, "image": batch["image"].float() * float("nan")}
        original(self, model, batch, metrics, number)

    spoilt: list[int] = []
    monkeypatch.setattr(FinetuneTask, "validation_step", step)
    monkeypatch.setattr(FinetuneTask, "score", "loss")
    monkeypatch.setattr(FinetuneTask, "higher_is_better", False)
    result = run(finetune("data.val_batch=1"), tmp_path)
    assert "val/loss is NaN at update 4" in caplog.text and "at update 8" not in caplog.text
    rows = [row["val/loss"] for row in read_metrics(tmp_path / "metrics.csv") if "val/loss" in row]
    assert rows[0] == "nan" and rows[1] != "nan" and result["best"]["update"] == 8


@pytest.mark.usefixtures("no_step")
def test_a_task_that_does_not_measure_its_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FinetuneTask, "score", "mAP")
    refused(finetune(), tmp_path, "FinetuneTask.score is 'mAP'.*metrics.* are loss, accuracy, top5")


def test_losses_that_all_weigh_nothing(tmp_path: Path) -> None:
    recipe = reduce("evit", "weights={class: 0}", "loop.max_steps=1")
    refused(recipe, tmp_path, "the losses class all have the weight 0, so that nothing is learnt")


# Folders -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_step")
def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused(finetune(), tmp_path / "file", "file cannot be written to: File exists")
    refused(finetune(), tmp_path / "file" / "run", "run cannot be written to: Not a directory")
    usage = SimpleNamespace(free=100 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(finetune(), tmp_path / "run", r"has 0.1 GiB free, and 2 checkpoints .* need about 0.2")


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    refused(finetune(), tmp_path / "run", "cannot be written to: Permission denied")


def test_existing_runs(tmp_path: Path) -> None:
    recipe = finetune("loop.epochs=1", "loop.max_steps=1")
    refused(
        recipe, tmp_path / "no", "no holds no run to resume: it has no recipe.yaml", resume=True
    )
    run(recipe, tmp_path)
    refused(recipe, tmp_path, "holds a run already: --resume goes on with it, --out takes another")
    changed = finetune("loop.epochs=1", "loop.max_steps=1", "optim.lr=0.5")
    refused(changed, tmp_path, "recipe.yaml differs from the given recipe", resume=True)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"PK")
    refused(recipe, tmp_path, "none of the checkpoints in .* can be read", resume=True)


def test_a_start_that_came_to_nothing_is_no_run(tmp_path: Path) -> None:
    """The same command goes through once its mistake is mended."""
    out = tmp_path / "runs" / "mine"
    refused(finetune("data.batch=65"), out, "a batch of 65")
    assert not out.parent.exists()
    refused(finetune("data.batch=65"), tmp_path, "a batch of 65")
    assert run(finetune("loop.max_steps=1"), tmp_path)["updates"] == 1


# Data --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.train=folder:nowhere", "nowhere"),
        ("data.train=fashion", "unknown data set 'fashion'; did you mean 'fashion-mnist'"),
        ("data.batch=65", "a batch of 65 is larger than the training data, which have 64 images"),
        ("data.mean=[.1, .2, .3] data.std=[1, 1, 1]", "need one value for each of the model's 1"),
        ("data.batch=15 mix.mixup=.1", "mixing pairs images: data.batch must be even, got 15"),
        ("loop.num_nodes=2", "loop.num_nodes=2, and MASTER_ADDR, MASTER_PORT and NODE_RANK do not"),
        ("loop.devices=9999", "loop.devices=9999 is more than the .* processor cores of this mach"),
        ("loop.precision=16-mixed", "16-mixed needs a GPU: on a CPU take 32 or bf16-mixed"),
    ],
)
def test_data(setting: str, words: str, tmp_path: Path) -> None:
    texts = setting.replace("] ", "]|").replace("15 mix", "15|mix").split("|")
    refused(finetune(*texts), tmp_path / "run", words)


def test_fewer_validation_images_than_processes() -> None:
    recipe = finetune("data.val_limit=2", "data.batch=2")
    task = make_finetune(recipe, 10)
    with pytest.raises(
        ValueError, match="3 processes need a validation image each, and the data have 2"
    ):
        make_loaders(recipe, task, open_data(recipe.data), rank=0, world=3, here=3)


def test_images_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from foveate.data import Unreadable, open_splits
    from foveate.data.sources.memory import ArraySource

    original, held = ArraySource.image, open_splits("fashion-mnist").val
    torn = int(held.indices[5])

    def image(self: Any, index: int) -> Any:
        if index == torn:
            raise Unreadable(f"{self.name(index)}: torn")
        return original(self, index)

    monkeypatch.setattr(ArraySource, "image", image)
    settings = ("loop.max_steps=1", "data.val_limit=2000", "data.val_batch=100")
    with caplog.at_level(logging.WARNING, "foveate"):
        result = run(finetune(*settings), tmp_path / "skip")
    assert result["images"] == {"train": 64, "val": 297, "unreadable": 1}
    assert caplog.text.count("torn") == 1
    refused(finetune(*settings, "data.corrupt=fail"), tmp_path / "fail", "torn")


# Models ------------------------------------------------------------------------------------------


def started(start: str, **more: Any) -> recipes.Model:
    return recipes.Model(start=start, **more)


def test_another_number_of_classes(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start.safetensors", num_classes=1000)
    recipe = finetune(model={"start": start})
    refused(recipe, tmp_path / "run", "has 1000 classes, the data 10: model.new_head=true trains a")
    model: Any = make_model(started(start, new_head=True), 10)
    assert model.head.out_features == 10 and model.training
    body = small_model(num_classes=1000).state_dict()
    same = [torch.equal(v, body[k]) for k, v in model.state_dict().items() if "head" not in k]
    assert all(same) and len(same) > 30
    headless = checkpoint(tmp_path / "headless.safetensors", num_classes=0)
    assert make_model(started(headless), 10).head.out_features == 10


def test_pretrained_heads_are_not_thrown_away_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model

    def create(name: str, pretrained: bool, **options: Any) -> Any:
        assert pretrained
        return original(name, **{"num_classes": 1000, **options})

    monkeypatch.setattr(timm, "create_model", create)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    model = recipes.Model(name="vit_tiny_patch16_224", start="pretrained", options=options)
    with pytest.raises(ValueError, match="pretrained has 1000 classes, the data 10: model.new_hea"):
        make_model(model, 10)
    model.new_head = True
    assert make_model(model, 10).head.out_features == 10
    assert make_model(model, None).num_classes == 0  # a probe needs none


def test_pooling_that_changes_keeps_the_head(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start.safetensors")
    model: Any = make_model(started(start, pool="avg"), 10)
    assert model.global_pool == "avg"
    assert torch.equal(model.head.weight, small_model().head.weight)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start.safetensors")
    base = {"name": "vit_tiny_patch16_224", "start": start}
    options = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "num_heads": 2}
    with pytest.raises(ValueError, match=r"does not fit vit_tiny.*; it has no: blocks.3.norm1.w"):
        make_model(recipes.Model(**base, options={**options, "depth": 4}), 10)
    with pytest.raises(ValueError, match=r"does not fit vit_tiny.*; too many: blocks.2.norm1.wei"):
        make_model(recipes.Model(**base, options={**options, "depth": 2}), 10)
    with pytest.raises(ValueError, match=r"of other shapes: pos_embed"):
        make_model(recipes.Model(**base, options={**options, "depth": 3, "img_size": 35}), 10)
    whole: Any = make_model(recipes.Model(**base, options={**options, "depth": 3}), 10)
    assert torch.equal(whole.head.weight, small_model().head.weight)
    averaged = {**options, "depth": 3, "global_pool": "avg"}
    assert make_model(recipes.Model(**base, options=averaged), 10).fc_norm.weight.numel() == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 7}, "the teacher has classes 7, the student 10: they do not fit"),
        ({"in_chans": 3}, "the teacher has channels 3, the student 1"),
        ({"patch_size": 4}, r"the teacher has patches \(7, 7\), the student \(4, 4\)"),
    ],
)
def test_teachers_that_do_not_fit(changes: dict[str, int], words: str, tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher.safetensors", **changes)
    with pytest.raises(ValueError, match=words):
        make_finetune(finetune(distill={"kind": "soft", "teacher": teacher}), 10)
    with pytest.raises(ValueError, match=words):
        make_reduce(reduce("dynamicvit", teacher=teacher), 10)


def test_a_teacher_with_a_method(tmp_path: Path) -> None:
    foveate.save(foveate.apply(small_model(), "evit"), tmp_path, everything=True)
    words = r"has the method evit\(.*\): a dense model is needed, such as the vit of a reduced one"
    recipe = finetune(distill={"kind": "hard", "teacher": str(tmp_path)})
    for teacher in (str(tmp_path), foveate.apply(small_model(), "evit")):
        recipe.distill.teacher = teacher
        with pytest.raises(ValueError, match=words) as error:
            make_finetune(recipe, 10)
        assert len(str(error.value)) < 300  # a module's own words fill a screen


@pytest.mark.usefixtures("no_step")
def test_what_a_model_cannot_do(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from small import hf

    hf("ViTForImageClassification", num_channels=1, image_size=28, patch_size=7).save_pretrained(
        tmp_path / "hf"
    )
    model = {"start": str(tmp_path / "hf")}
    out = tmp_path / "run"
    refused(finetune("optim.layer_decay=0.7", model=model), out, "layer_decay=0.7 needs a model of")
    refused(finetune(model={**model, "drop_path": 0.1}), out, "blocks have no place for it")
    refused(finetune(model={**model, "pool": "avg"}), out, "cannot be given model.pool=avg")
    averaged = finetune("model.options.global_pool=avg", masking={"ratios": [1.0]})
    refused(averaged, out, "masking.ratios holds 1, which leaves nothing of 16 patches")
    unknown = finetune("model.name=vit_tiny_patch61", "model.options={}")
    refused(unknown, out, "model.name=vit_tiny_patch61 is unknown: it must be a model that")
