"""The best weights by the validation score, early stopping, and runs that are made longer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import exported, finetune, reduce, run
from safetensors.torch import load_file

import foveate
from foveate.cli import main
from foveate.train.logs import read_metrics
from foveate.train.module import Module


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Scores that evaluations are said to have had, one after another."""
    given: list[float] = []
    told: Iterator[int] = iter(range(1000))
    monkeypatch.setattr(Module, "judged", lambda self: (given[next(told)], True))
    return given


def test_the_best_weights_are_exported_beside_the_last(tmp_path: Path, scores: list) -> None:
    scores += [10.0, 30.0, 30.0, 25.0]
    result = run(finetune("loop.epochs=4", "loop.keep_last=9"), tmp_path)
    best = {"score": 30.0, "update": 8, "model": "best/model.safetensors"}
    assert result["best"] == best and result["model"] == "model.safetensors"
    assert json.loads((tmp_path / "result.json").read_text())["best"] == best
    found = load_file(tmp_path / "best" / "model.safetensors")
    for update, equal in ((8, True), (16, False)):
        content = torch.load(tmp_path / f"checkpoints/update-{update:08d}.ckpt", weights_only=True)
        state = content["state_dict"]
        same = all(torch.equal(found[key], state[f"task.model.{key}"]) for key in found)
        assert same is equal
    assert not torch.equal(found["head.weight"], exported(tmp_path)["head.weight"])
    # What the result holds is what its scores are of.
    assert torch.equal(result.model.head.weight, exported(tmp_path)["head.weight"])
    assert isinstance(foveate.load(tmp_path / "best"), torch.nn.Module)


def test_the_last_weights_may_be_the_best(tmp_path: Path, scores: list) -> None:
    scores += [10.0, 20.0]
    result = run(finetune("loop.ema=0.5"), tmp_path)
    assert result["best"] == {"score": 20.0, "update": 8, "model": "model.safetensors"}
    assert not (tmp_path / "best").exists()


def test_a_run_ends_when_nothing_gets_better(tmp_path: Path, scores: list) -> None:
    scores += [30.0, 20.0, 30.0, 99.0, 5.0]
    result = run(finetune("loop.epochs=9", "loop.patience=2"), tmp_path)
    # The last evaluation is of the end: the fourth.
    assert result["updates"] == 12 and result["epochs"] == 3
    assert result["best"]["update"] in (4, 12)


def test_a_run_that_the_patience_ended_stays_ended(
    tmp_path: Path, scores: list, caplog: pytest.LogCaptureFixture
) -> None:
    scores += [30.0, 20.0] + 20 * [10.0]
    settings = ["loop.epochs=9", "loop.patience=1"]
    ended = run(finetune(*settings), tmp_path)
    before = exported(tmp_path)
    for more in ([], ["loop.epochs=12"]):
        caplog.clear()
        again = run(finetune(*settings, *more), tmp_path, resume=True)
        assert "ended at update 8 because loop.patience=1 was used up" in caplog.text
        assert again["updates"] == ended["updates"] == 8 and again["best"] == ended["best"]
        assert all(torch.equal(value, before[key]) for key, value in exported(tmp_path).items())
    again = run(finetune("loop.epochs=12", "loop.patience=3"), tmp_path, resume=True)
    assert again["updates"] == 16 and again["best"]["update"] == 4


def test_scores_of_a_rate_that_still_sinks_do_not_count(tmp_path: Path, scores: list) -> None:
    scores += [20.0, 15.0]  # of the third and the fourth epoch
    method = "evit(keep=0.5, blocks=[1], warmup=[0.25, 0.75])"
    result = run(reduce(method, "loop.epochs=4"), tmp_path)
    assert result["best"]["update"] == 12 and result["best"]["score"] == 20.0
    assert foveate.load(tmp_path / "best" / "model").reducer.config()["keep"] == 0.5


def test_a_finished_run_is_made_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(finetune("loop.epochs=2"), out)
    assert main(["finetune", "--resume", str(out), "loop.epochs=3"]) == 0
    assert "accuracy " in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["updates"] == 12 and result["epochs"] == 3
    steps = [int(row["step"]) for row in read_metrics(out / "metrics.csv") if "train/loss" in row]
    assert steps == list(range(12))
    for settings, message in (
        (("loop.epochs=2",), "a run goes on as it began, but for more loop.epochs"),
        (("loop.max_steps=5",), "more loop.epochs or loop.max_steps and another loop.patience"),
        (("optim.lr=1",), "at most loop.epochs, loop.max_steps or loop.patience"),
        (("loop.epochs=4", "optim.lr=1"), "at most loop.epochs, loop.max_steps or loop.pat"),
    ):
        assert main(["finetune", "--resume", str(out), *settings]) == 2
        assert message in capsys.readouterr().err
    assert (out / "result.json").is_file()
    with pytest.raises(ValueError, match="loop.patience must be at least 1, got 0"):
        finetune("loop.patience=0")
