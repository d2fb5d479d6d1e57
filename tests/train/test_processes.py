"""Two processes are one with the doubled batch: losses, weights, evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import (
    DATA,
    LOOP,
    MODEL,
    adapt,
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
    watched,
)

from foveate import cli, config
from foveate.train.logs import read_metrics

# No mixing, no stochastic depth and gates that do not draw: noise is each process's own. Momentum
# instead of Adam, whose first steps are signs and would hide a wrong scale.
SETTINGS: dict[str, Any] = {
    "optim": {
        **{"name": "sgd", "lr": 0.05, "warmup_epochs": 0.5, "clip": 1.0},
        "fixed": ["pos_embed"],  # which no process may wait for
    },
    "data": {**DATA, "val_limit": 17, "val_batch": 8},
    "loop": {**LOOP, "epochs": 1},
}


def recipes(root: Path) -> dict[str, Any]:
    """A mean over images, one over the batch, and one over the tokens that were kept."""
    parts = {**SETTINGS, "model": {"start": checkpoint(root / "start.safetensors")}}
    masked = {"masking": {"ratios": [0, 0.5, 0.75]}, "distill": {"kind": "soft"}}
    svit, dynamic = "svit(keep=0.5, gate='argmax')", "dynamicvit(keep=0.5, gate='argmax')"
    return {
        "finetune": finetune(**masked, **parts),
        "reduce": reduce(svit, "loop.ema=0.5", "loop.statistics=true", **parts),
        "tokens": reduce(dynamic, **parts),
        "adapt": adapt(parts["model"]["start"], svit, **SETTINGS),
    }


def test_two_processes(tmp_path: Path) -> None:
    jobs, wanted = [], []
    for name, recipe in recipes(tmp_path).items():
        with watched() as losses:
            wanted.append((name, losses, run(recipe, tmp_path / f"{name}-one")))
        recipe.data.batch //= 2
        path = tmp_path / f"{name}.yaml"
        path.write_text(config.dump(recipe))
        job = name if name != "tokens" else "reduce"
        jobs.append([job, str(path), "--out", str(tmp_path / f"{name}-two")])
    # The first once more: it fails in its second update on both processes, and goes on.
    stopped = tmp_path / "stopped"
    jobs += [[*jobs[0][:2], "loop.save_every=1", "--out", str(stopped)]]
    jobs += [["finetune", "--resume", str(stopped)]]
    assert together(jobs, tmp_path, stop=(len(jobs) - 2, 2)) == [0, 0]
    one, two = exported(tmp_path / "finetune-two"), exported(stopped)
    assert all(torch.equal(one[key], two[key]) for key in one)
    for number, (name, losses, result) in enumerate(wanted):
        one, two = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        both = torch.tensor([torch.load(tmp_path / f"losses-{number}-{r}.pt") for r in (0, 1)])
        assert both.shape[1] == len(losses) > 3 and not torch.equal(both[0], both[1])
        torch.testing.assert_close(
            both.mean(0), torch.tensor(losses), rtol=1e-4, atol=1e-5, msg=name
        )
        for key, value in exported(one).items():
            torch.testing.assert_close(exported(two)[key], value, rtol=1e-3, atol=1e-5, msg=key)
        found = json.loads((two / "result.json").read_text())
        scores = [key for key in result.metrics if key != "updates"]
        assert {"accuracy", "loss"} <= set(scores) or {"kl", "kl_before"} <= set(scores)
        for key in scores:
            assert found[key] == pytest.approx(result[key], rel=1e-3, abs=1e-3), (name, key)
        assert found["updates"] == result["updates"] and found["model"] == result["model"]
        logs = [read_metrics(out / "metrics.csv") for out in (one, two)]
        assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
        assert not list(two.rglob("*.partial")) and not list(two.glob(".writable*"))


@pytest.mark.slow
def test_torchrun_itself(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(finetune()))
    command = [*launch, "-m", "foveate", "finetune", str(path), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model is") == 1
    assert exported(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_long_look_stalls_nobody(tmp_path: Path) -> None:
    """A reading in pre-training that takes longer than processes wait for gradients."""
    path = tmp_path / "recipe.yaml"
    tree = {
        "model": MODEL,
        "data": {**DATA, "batch": 16},
        "loop": {**LOOP, "epochs": 1},
        "options": {"decoder_width": 32, "decoder_depth": 1},
        "layers_every": 1,
    }
    path.write_text(yaml.safe_dump(tree))
    job = ["pretrain", str(path), "--out", str(tmp_path / "run")]
    port = free_port()
    processes = [start(_impatient, rank, port, job) for rank in (0, 1)]
    assert [ended(process) for process in processes] == [0, 0]
    assert json.loads((tmp_path / "run/result.json").read_text())["updates"] == 2


def _impatient(rank: int, port: int, job: list[str]) -> None:
    import functools
    import time

    from lightning.pytorch.strategies import ddp

    from foveate.mim.callbacks import LayerLog

    wait, original = timedelta(seconds=6), LayerLog.act
    ddp._init_dist_connection = functools.partial(_connect, ddp._init_dist_connection, wait)

    def act(self: LayerLog, *arguments: Any) -> None:
        time.sleep(9)
        original(self, *arguments)

    LayerLog.act = act  # type: ignore[method-assign]
    join(rank, 2, port)
    raise SystemExit(cli.main(job))


def _connect(original: Any, wait: timedelta, *arguments: Any, **options: Any) -> None:
    original(*arguments, **{**options, "timeout": wait})
