"""Weights shared out among two processes: they train as one does, stop, go on and are exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    DATA,
    LOOP,
    checkpoint,
    ended,
    exported,
    finetune,
    free_port,
    join,
    reduce,
    run,
    start,
    together,
)

from foveate import config

SETTINGS: dict[str, Any] = {
    "optim": {"name": "sgd", "lr": 0.05, "warmup_epochs": 0.5, "clip": 1.0},
    "data": {**DATA, "limit": 32, "val_limit": 17, "val_batch": 8},
    "loop": {**LOOP, "epochs": 2},
}


@pytest.mark.slow  # the blocks are in tests/core/test_sharded.py
def test_sharded_processes_are_one(tmp_path: Path) -> None:
    parts = {**SETTINGS, "model": {"start": checkpoint(tmp_path / "start.safetensors")}}
    jobs = {
        "finetune": finetune("loop.patience=9", **parts),
        "reduce": reduce("dynamicvit(keep=0.5, gate='argmax')", "loop.ema=0.5", **parts),
    }
    words, results = [], {}
    for job, recipe in jobs.items():
        results[job] = run(recipe, tmp_path / f"{job}-one")
        recipe.data.batch //= 2
        recipe.loop.strategy = "fsdp"
        path = tmp_path / f"{job}.yaml"
        path.write_text(config.dump(recipe))
        words.append([job, str(path), "--out", str(tmp_path / f"{job}-two")])
    # The last one is stopped in its second epoch and goes on.
    stopped = tmp_path / "stopped"
    words.append([*words[1][:2], "loop.save_every=1", "--out", str(stopped)])
    words.append(["reduce", "--resume", str(stopped)])
    assert together(words, tmp_path, stop=(2, 3)) == [0, 0]
    for job, result in results.items():
        one, two = exported(tmp_path / f"{job}-one"), exported(tmp_path / f"{job}-two")
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)
        found = json.loads((tmp_path / f"{job}-two" / "result.json").read_text())
        assert abs(found["accuracy"] - result["accuracy"]) < 0.01
        assert found["best"] == result["best"]
        best = [
            torch.load(tmp_path / f"{job}-{n}" / "best.pt", weights_only=True)
            for n in ("one", "two")
        ]
        assert best[0].keys() == best[1].keys()
        for key, value in best[0].items():
            torch.testing.assert_close(best[1][key], value, rtol=1e-3, atol=1e-5, msg=key)
        saved = torch.load(tmp_path / f"{job}-two/checkpoints/update-00000004.ckpt")
        weights = saved["state_dict"]
        head = "task.model.head.weight" if job == "finetune" else "task.model.vit.head.weight"
        assert all(type(value) is torch.Tensor for value in weights.values())
        assert weights[head].shape == (10, 32)  # whole, as one process saves them
    one, two = exported(tmp_path / "reduce-two"), exported(stopped)
    assert all(torch.equal(one[key], two[key]) for key in one)  # resumed to the bit


def test_every_process_gets_the_model(tmp_path: Path) -> None:
    port = free_port()
    processes = [start(_keeps_the_model, tmp_path, rank, port) for rank in (0, 1)]
    assert [ended(process) for process in processes] == [0, 0]
    for strategy in ("ddp", "fsdp"):
        wanted = exported(tmp_path / strategy)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{strategy}-{rank}.pt")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())


def _keeps_the_model(folder: Path, rank: int, port: int) -> None:
    join(rank, 2, port)
    for strategy in ("ddp", "fsdp"):
        recipe = finetune(
            *("loop.max_steps=1", "data.batch=8", "data.val_limit=8", f"loop.strategy={strategy}")
        )
        model = run(recipe, folder / strategy).model
        assert not model.training
        torch.save(model.state_dict(), folder / f"{strategy}-{rank}.pt")
