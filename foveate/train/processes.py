"""Where a run takes place: its device, how many processes train together, and what it needs."""

from __future__ import annotations

import importlib.util
import os

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from foveate import machine
from foveate.train.recipe import Loop

__all__ = ["check_loop", "device_of", "processes"]


def check_loop(loop: Loop) -> None:
    """Refuse settings of a run that this machine cannot follow."""
    device = device_of(loop)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("loop.device=cuda, and this machine has no GPU that torch can use")
    if loop.precision == "16-mixed" and device == "cpu":
        # Lightning would take bf16-mixed and merely mention it.
        raise ValueError("loop.precision=16-mixed needs a GPU: on a CPU take 32 or bf16-mixed")
    for name in loop.loggers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"loop.loggers={name} needs a package: pip install {name}")
    processes(loop, device)


def device_of(loop: Loop) -> str:
    """Return the device that a run's settings stand for."""
    return machine.device_of("auto") if loop.device == "auto" else loop.device


def processes(loop: Loop, device: str) -> tuple[int, int]:
    """Return the numbers of processes on each machine, and of machines.

    torchrun and SLURM have started theirs; else Lightning starts as many as ``loop.devices`` says,
    one for each GPU if it says nothing.
    """
    started = _started()
    if started is not None:
        who, here, machines = started
        if loop.devices not in (None, here):
            raise ValueError(
                f"loop.devices={loop.devices}, and {who} has started {here} processes on this "
                "machine: leave it out"
            )
        return here, machines
    there = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    if loop.num_nodes > 1 and "MASTER_ADDR" not in os.environ:  # else it would wait for minutes
        raise ValueError(
            f"loop.num_nodes={loop.num_nodes}, and MASTER_ADDR, MASTER_PORT and NODE_RANK do not "
            "say where the first machine is and which this is: set them on each, or use torchrun"
        )
    asked = loop.devices or (there if device == "cuda" else 1)
    if asked > there:
        what = "GPUs" if device == "cuda" else "processor cores"
        raise ValueError(f"loop.devices={asked} is more than the {there} {what} of this machine")
    return asked, loop.num_nodes


def _started() -> tuple[str, int, int] | None:
    """Return who started the processes, how many on this machine, and on how many machines."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", here, max(1, int(os.environ["WORLD_SIZE"]) // here)
    if SLURMEnvironment.detect():
        machines = int(os.environ.get("SLURM_NNODES", 1))
        return "SLURM", int(os.environ["SLURM_NTASKS"]) // machines, machines
    return None
