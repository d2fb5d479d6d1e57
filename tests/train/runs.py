"""Small training runs: settings, in this process, and in processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from foveate import config
from foveate.convert import save_plain
from foveate.train import recipe as recipes
from foveate.train.adapt import adapt as run_adapt
from foveate.train.dense_recipe import Detect, Segment
from foveate.train.detect import detect
from foveate.train.models import make_model
from foveate.train.module import Module
from foveate.train.run import train
from foveate.train.segment import segment

MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "options": {
        **{"img_size": 28, "patch_size": 7, "in_chans": 1},
        **{"embed_dim": 32, "depth": 3, "num_heads": 2},
    },
}
DATA: dict[str, Any] = {
    **{"train": "fashion-mnist", "mean": [0.286], "std": [0.353], "batch": 16, "limit": 64},
    **{"val_limit": 32, "augment": {"crop": "pad", "pad": 2}},
}
LOOP: dict[str, Any] = {"epochs": 2, "log_every": 1, "loggers": []}
TREE: dict[str, Any] = {"model": MODEL, "data": DATA, "loop": LOOP}


def finetune(*overrides: str, **parts: Any) -> recipes.Finetune:
    """A recipe of 8 updates with 16 images each on a model of 16 patches and 3 blocks."""
    return config.parse(recipes.Finetune, {**TREE, **parts}, overrides)


def reduce(method: str, *overrides: str, **parts: Any) -> recipes.Reduce:
    """The same with a method, from scratch; the teacher is to be named."""
    return config.parse(recipes.Reduce, {**TREE, "method": method, **parts}, overrides)


def adapt(start: Any, method: str | None, *overrides: str, **parts: Any) -> recipes.Adapt:
    """Such a run that makes a model with a method agree with itself."""
    tree = {**TREE, "model": {"start": start}, "method": method, **parts}
    return config.parse(recipes.Adapt, tree, overrides)


def small_model(**changes: Any) -> Any:
    """The plain model of the recipes, without training."""
    torch.manual_seed(7)
    options = {**MODEL["options"], **changes}
    classes = options.pop("num_classes", 10)
    return make_model(recipes.Model(name=MODEL["name"], options=options), classes)


def checkpoint(path: Path, **changes: Any) -> str:
    """A file with the weights of such a model."""
    save_plain(small_model(**changes), path)
    return str(path)


def run(recipe: Any, out: Path, **options: Any) -> Any:
    """Train in this process."""
    known: dict[type, Any] = {Detect: detect, Segment: segment, recipes.Adapt: run_adapt}
    return known.get(type(recipe), train)(recipe, out, progress=False, **options)


def exported(out: Path) -> dict[str, Tensor]:
    """The weights that a run exported."""
    places = ("model.safetensors", "model/foveate.safetensors", "model/dense.safetensors")
    return load_file(next(out / place for place in places if (out / place).is_file()))


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, to the bit, and logged the same."""
    a, b = exported(one), exported(other)
    logs = [(out / "metrics.csv").read_text() for out in (one, other)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and logs[0] == logs[1]


# Other processes ---------------------------------------------------------------------------------


def start(target: Any, *arguments: Any) -> BaseProcess:
    """Start a function in a process that has all libraries imported and has run none of them.

    It is a copy of a server that waits there: importing anew would take longer than the runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foveate.train.run", "foveate.cli"])
    process = context.Process(target=_begin, args=(target, *arguments))
    process.start()
    return process


def _begin(target: Any, *arguments: Any) -> None:
    # Workers of data loaders would come from a server of their own, and import everything.
    multiprocessing.set_start_method("fork", force=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody asks
    torch.set_num_threads(1)
    target(*arguments)


def ended(process: BaseProcess) -> int:
    """The exit code of a process, which is negative for a signal."""
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the process hangs")
    return process.exitcode


def together(
    jobs: list[list[str]], folder: Path, world: int = 2, stop: tuple[int, int] | None = None
) -> list[int]:
    """Run commands one after another on processes that train together, as torchrun starts them.

    Each leaves the losses of its updates in ``folder / "losses-JOB-RANK.pt"``. Gives exit codes.
    ``stop`` names a job and the update before which it fails; that it does is no failure.
    """
    port = free_port()
    processes = [start(_joined, jobs, folder, rank, world, port, stop) for rank in range(world)]
    return [ended(process) for process in processes]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(rank: int, world: int, port: int) -> None:
    """Make this process one of several, as torchrun does."""
    from lightning.pytorch.utilities import rank_zero_only

    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
        **{"LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
    }
    # Lightning asks the environment as it is imported, and the server imported it without one.
    rank_zero_only.rank = rank


def _joined(
    jobs: list[list[str]],
    folder: Path,
    rank: int,
    world: int,
    port: int,
    stop: tuple[int, int] | None,
) -> None:
    from foveate.cli import main

    join(rank, world, port)
    codes = []
    for number, job in enumerate(jobs):
        fails = stop is not None and number == stop[0]
        with watched(stop[1] if stop and fails else None) as losses:
            code = main(job)
        codes.append(int(code != 2) if fails else code)
        torch.save(losses, folder / f"losses-{number}-{rank}.pt")
    raise SystemExit(max(codes))


@contextmanager
def watched(stop: int | None = None) -> Iterator[list[float]]:
    """A list that the losses of all steps are appended to meanwhile; the run fails at one."""
    losses: list[float] = []
    original = Module._watch

    def noting(self: Module, parts: dict[str, Tensor], loss: Tensor) -> None:
        if self.trainer.global_step == stop:
            raise ValueError("stopped by the test")
        losses.append(float(loss.detach()))
        original(self, parts, loss)

    Module._watch = noting  # type: ignore[method-assign]
    try:
        yield losses
    finally:
        Module._watch = original  # type: ignore[method-assign]


def elsewhere(recipe: Any, out: Path, *, resume: bool = False, kill: str = "") -> int:
    """Train in a process of its own; ``kill`` says where it kills itself.

    "1,5" is before the sixth batch of the second epoch, "end1" after the second epoch, "val1" in
    its evaluation.
    """
    return ended(start(_train, recipe, out, resume, kill))


def _train(recipe: Any, out: Path, resume: bool, kill: str) -> None:
    if kill:
        _plant(kill)
    run(recipe, out, resume=resume)


def _plant(kill: str) -> None:
    """Let the process die, as by the system: nothing of it gets to tidy up."""
    from foveate.train.checkpoints import Checkpoints

    def die() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()  # they would notice after seconds, and complain
        os.kill(os.getpid(), signal.SIGKILL)

    place: Any = Module
    if kill.startswith("end"):
        place, name = Checkpoints, "on_train_epoch_end"
    else:
        name = "validation_step" if kill.startswith("val") else "training_step"
    original = getattr(place, name)

    def dies(self: Any, *arguments: Any) -> Any:
        if kill.startswith("end"):
            original(self, *arguments)
            if f"end{arguments[0].current_epoch}" == kill:
                die()
            return None
        where = f"{self.current_epoch},{arguments[1]}"
        if kill in (where, f"val{self.current_epoch}"):
            die()
        return original(self, *arguments)

    setattr(place, name, dies)
