"""Divide weights, gradients and moments among all processes, with torch's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

__all__ = ["Sharded", "hold_whole", "shard", "whole_state"]


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


def shard(model: nn.Module, units: Sequence[str], mesh: Any) -> None:
    """Shard the given parts of a model one by one, and the rest of it as one part.

    What steps call beside ``forward`` gathers the weights too.
    """
    for name in units:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "run"):
        register_fsdp_forward_method(model, "run")


def hold_whole(model: nn.Module, whole: bool) -> None:
    """Keep all weights on every process while there are no gradients, or stop keeping them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The outermost part keeps its weights for the backward pass, as ``fully_shard`` does by
            # default: ``run`` does not return a tensor on which it could notice the beginning of
            # that pass.
            module.set_reshard_after_forward(not whole and module is not model, recurse=False)
            if whole:
                module.unshard()
            else:
                module.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state of a model that may be sharded, on the CPU.

    Every process gets it, and all must call this.
    """
    found = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found[name] = whole.detach().cpu()
    return found
