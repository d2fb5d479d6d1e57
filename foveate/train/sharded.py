"""Weights, gradients and moments shared out among all processes, by torch's ``fully_shard``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from foveate.train.task import Task

__all__ = ["Sharded", "gathered", "hold_whole", "shard"]


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for it, with whole checkpoints in one file.

    Args:
        processes: all of them.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )


def shard(task: Task, mesh: Any) -> None:
    """Shard each unit of a task by itself, and the rest of its model as one.

    What steps call beside ``forward`` gathers the weights too.
    """
    for unit in task.units():
        fully_shard(unit, mesh=mesh)
    fully_shard(task.model, mesh=mesh)
    if hasattr(task.model, "run"):
        register_fsdp_forward_method(task.model, "run")


def hold_whole(model: nn.Module, whole: bool) -> None:
    """Hold all weights on every process, for as long as there are no gradients; or no longer."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(not whole, recurse=False)
            if whole:
                module.unshard()
            else:
                module.reshard()


def gathered(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Put the weights of a sharded model into a copy of it that is not; all processes must ask."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if state:  # the first process alone gets it
        plain.load_state_dict(state)
    return plain
