"""Run the hooks of the model's own modules, although their forward is not called.

A block is driven by its parts, so its ``forward`` is never called. Hooks on it must run all the
same: forward and backward hooks, and those of ``fully_shard``, which gather a block's weights and
release them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from foveate.core.tokens import TokenState

__all__ = ["call_with_hooks", "check_sharding", "has_hooks", "is_sharded"]

_log = logging.getLogger(__name__)
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module itself has hooks; warn once if it was compiled on its own."""
    if not torch.compiler.is_compiling() and module._compiled_call_impl is not None:
        _warn_compiled(module)
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def call_with_hooks(
    module: nn.Module,
    state: TokenState,
    forward: Callable[[TokenState], TokenState],
    wrap: Callable[[Tensor], Any] | None = None,
) -> TokenState:
    """Run ``forward`` in place of the module's own, with all hooks of the module.

    Hooks see tokens ``[B, N, C]``, or ``[1, T, C]`` where images differ in count, and may change
    them. The module that they get has all attributes of the real one.

    Args:
        module: a block or its attention.
        state: the tokens that enter.
        forward: computes the tokens that leave, which may be fewer.
        wrap: puts the output into the form of the module's own output.
    """
    result: list[TokenState] = []

    def inside(x: Tensor) -> Any:
        result.append(forward(state.with_tokens(x)))
        out = _batched(result[0])
        return out if wrap is None else wrap(out)

    out = _StandIn(module, inside)(_batched(state))
    if isinstance(out, tuple):
        out = out[0]
    return result[0].with_tokens(out)


def _batched(state: TokenState) -> Tensor:
    return state.tokens() if state.layout.is_even else state.x[None]


class _StandIn(nn.Module):
    """Shares everything with a module, its hooks too, except its forward."""

    __slots__ = ("_run",)  # kept out of the shared dictionary
    _run: Callable[[Tensor], Any]

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Any]) -> None:
        object.__setattr__(self, "__dict__", vars(module))
        object.__setattr__(self, "_run", run)

    def __call__(self, x: Tensor) -> Any:
        return self._call_impl(x)

    @property
    def forward(self) -> Callable[[Tensor], Any]:  # type: ignore[override]
        """Function that runs in place of the module's own forward."""
        return self._run


def is_sharded(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` was called on a module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def check_sharding(model: nn.Module) -> None:
    """Refuse a ViT that was sharded as a whole: only its own forward would gather its weights."""
    if is_sharded(model):
        raise RuntimeError(
            "fully_shard was called on the ViT inside, whose own forward is not run: call it on "
            "each of its blocks and on the reduced model instead"
        )


def _warn_compiled(module: nn.Module) -> None:
    if module not in _warned:
        _warned.add(module)
        _log.warning(
            "a %s was compiled on its own, which has no effect: its parts are called one by one; "
            "compile the whole reduced model instead",
            type(module).__name__,
        )
