"""The dense model with un-fused attention, which shows what its N x N map costs."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["shared_copy", "unfused"]


def shared_copy(model: nn.Module) -> Any:
    """Make a copy with its own switches; parameters and buffers are shared with the model."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def unfused(model: nn.Module, images: Tensor) -> nn.Module:
    """Make a copy that shares the weights and computes its attention maps.

    Raises ValueError if the model has no switch for it, or runs a fused kernel all the same.
    """
    twin, told = shared_copy(model), False
    if hasattr(twin, "set_attn_implementation"):  # Hugging Face
        twin.set_attn_implementation("eager")
        told = True
    for module in twin.modules():
        if hasattr(module, "fused_attn"):  # timm
            module.fused_attn = False
            told = True
    if not told:
        raise ValueError(f"{type(model).__name__} has no switch for its fused attention")
    with _Kernels() as seen, torch.no_grad():
        twin(images)
    if seen.fused:
        raise ValueError(f"{type(model).__name__} runs {seen.fused} even with its switch off")
    return twin


class _Kernels(TorchDispatchMode):
    """Notes the name of a fused attention kernel when one runs."""

    fused = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.fused = str(func)
        return func(*args, **(kwargs or {}))
