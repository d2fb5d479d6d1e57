"""A run that is killed goes on and ends with the weights, to the bit, of one that was not."""

from __future__ import annotations

import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import checkpoint, elsewhere, exported, finetune, reduce, run, same_run

from foveate.train.logs import read_metrics

# Everything that draws, and everything that has a state.
ALL: dict[str, Any] = {
    "mix": {"mixup": 0.2, "cutmix": 0.5, "erase": 0.3, "smoothing": 0.1},
    "optim": {"lr": 3e-3, "warmup_epochs": 0.5, "clip": 1.0},
}
LOOP = ["loop.ema=0.8", "loop.accumulate=2", "loop.save_every=1", "data.batch=8"]


def files(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Masked fine-tuning with a teacher, 2 epochs of 4 updates, and its undisturbed run."""
    root = tmp_path_factory.mktemp("masked")
    start = checkpoint(root / "start.safetensors")
    recipe = finetune(
        *LOOP,
        **ALL,
        model={"start": start, "drop_path": 0.2},
        masking={"ratios": [0, 0.25, 0.5, 0.75]},
        distill={"kind": "soft"},
    )
    assert elsewhere(recipe, root / "whole") == 0
    return recipe, root / "whole"


@pytest.mark.parametrize(
    ("kill", "workers"), [("1,5", 0), pytest.param("end0", 2, marks=pytest.mark.slow), ("val1", 0)]
)
def test_masked_fine_tuning(
    kill: str, workers: int, masked: tuple[Any, Path], tmp_path: Path
) -> None:
    recipe, whole = masked
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    out = tmp_path / "run"
    assert elsewhere(recipe, out, kill=kill) == -signal.SIGKILL
    assert not (out / "result.json").exists()
    newest = {"1,5": 6, "end0": 4, "val1": 7}[kill]
    assert files(out) == [f"update-{n:08d}.ckpt" for n in (newest - 1, newest)]
    assert elsewhere(recipe, out, resume=True) == 0
    assert same_run(whole, out)
    assert not list(out.rglob("*.partial")) and not list(out.glob(".writable*"))
    assert files(out) == ["update-00000007.ckpt", "update-00000008.ckpt"]


@pytest.mark.slow
def test_gates_that_are_sampled(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start.safetensors")
    model = {"start": start, "drop_path": 0.2}
    recipe = reduce("dynamicvit(keep=0.5)", *LOOP, "data.workers=2", **ALL, model=model)
    assert elsewhere(recipe, tmp_path / "whole") == 0
    out = tmp_path / "run"
    assert elsewhere(recipe, out, kill="0,5") == -signal.SIGKILL
    assert elsewhere(recipe, out, resume=True, kill="end0") == -signal.SIGKILL
    assert elsewhere(recipe, out, resume=True) == 0
    assert same_run(tmp_path / "whole", out)


def test_a_damaged_checkpoint(
    masked: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, whole = masked
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    newest = out / "checkpoints" / "update-00000008.ckpt"
    newest.write_bytes(newest.read_bytes()[:5000])
    (out / "checkpoints" / "update-00000009.ckpt.partial").write_bytes(b"half")
    with caplog.at_level(logging.INFO, "foveate"):
        run(recipe, out, resume=True)
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert any(
        f"{newest} is damaged" in text and "the one before it is used" in text for text in said
    )
    assert f"resuming from {out}/checkpoints/update-00000007.ckpt, update 7" in caplog.text
    assert same_run(whole, out)
    assert torch.load(newest, weights_only=True)["global_step"] == 8
    assert not list(out.rglob("*.partial"))


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    """With one that stays, a damaged later one would have counted as it."""
    recipe = finetune("loop.keep_last=1", "loop.epochs=3", "loop.save_every=1")
    run(finetune("loop.keep_last=1", "loop.epochs=1"), tmp_path)
    text = (tmp_path / "recipe.yaml").read_text()
    text = text.replace("epochs: 1,", "epochs: 3,").replace("save_every: null", "save_every: 1")
    (tmp_path / "recipe.yaml").write_text(text)
    later = tmp_path / "checkpoints" / "update-00000099.ckpt"
    later.write_bytes(b"PK half")
    run(recipe, tmp_path, resume=True)
    assert files(tmp_path) == ["update-00000012.ckpt"]


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    recipe = finetune("loop.epochs=1")
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(recipe, whole)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    (out / "result.json").unlink()
    run(recipe, out, resume=True)
    assert same_run(whole, out)


def test_a_run_that_was_killed_before_its_result(tmp_path: Path) -> None:
    """Nothing is left to train then, and the evaluation was done."""
    recipe = finetune("loop.epochs=1", "loop.ema=0.9")
    result = run(recipe, tmp_path)
    log = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "model.safetensors").unlink()
    again = run(recipe, tmp_path, resume=True)
    for key in ("accuracy", "loss", "accuracy_without_ema", "updates", "epochs", "model"):
        assert again[key] == result[key]
    assert (tmp_path / "metrics.csv").read_text() == log


def test_steps_that_are_cut_short(tmp_path: Path) -> None:
    """A trial of three updates ends inside the first epoch, is evaluated, and stays so."""
    recipe = finetune("loop.max_steps=3", "loop.save_every=2")
    result = run(recipe, tmp_path)
    assert result["updates"] == 3 and result["epochs"] == 0.75
    rows = read_metrics(tmp_path / "metrics.csv")
    (scored,) = [row for row in rows if "val/accuracy" in row]
    assert float(scored["val/accuracy"]) == pytest.approx(result["accuracy"], rel=1e-4)
    assert [row["step"] for row in rows if "train/loss" in row] == ["0", "1", "2"]
    before = exported(tmp_path)
    again = run(recipe, tmp_path, resume=True)
    assert again["updates"] == 3 and again["accuracy"] == result["accuracy"]
    assert all(torch.equal(value, before[key]) for key, value in exported(tmp_path).items())


@pytest.mark.parametrize(
    ("settings", "trials"),
    [
        ([], (1, 3, 5, 6)),
        pytest.param(["loop.accumulate=3", "loop.ema=0.5"], (1, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_a_trial_becomes_a_whole_run(
    settings: list[str], trials: tuple[int, ...], tmp_path: Path
) -> None:
    """What a trial looked at in the end leaves no trace in the best weights of the longer run.

    One of the trials ends with an epoch.
    """
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = ["data.limit=80", *settings]  # 5 batches an epoch
    result = run(finetune(*settings), whole)
    for steps in trials:
        trial = run(finetune(*settings, f"loop.max_steps={steps}"), out, resume=steps > 1)
        assert trial["updates"] == steps
    assert len(files(out)) == 2
    again = run(finetune(*settings), out, resume=True)
    assert same_run(whole, out) and again["best"] == result["best"]
    best = [torch.load(folder / "best.pt", weights_only=True) for folder in (whole, out)]
    assert all(torch.equal(best[1][key], value) for key, value in best[0].items())


def test_other_processes_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(finetune("loop.epochs=1"), tmp_path)
    path = tmp_path / "checkpoints" / "update-00000004.ckpt"
    content = torch.load(path, weights_only=True)
    content["run"]["update_images"] = 32  # as of two processes
    torch.save(content, path)
    with pytest.raises(ValueError, match="updates of 32 images.* with 16: resume on as many proc"):
        run(finetune("loop.epochs=1"), tmp_path, resume=True)
