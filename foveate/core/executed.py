"""Count the tokens in torch's matrix products, to prove that a method is in effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.core.backbone import Backbone

__all__ = ["check_executed", "executed_tokens", "watched_weights"]

_PRODUCTS = frozenset({"addmm", "linear", "matmul", "mm"})


def watched_weights(backbone: Backbone) -> list[nn.Parameter]:
    """Return the weight of the second-last linear layer of each block, in the feed forward.

    The last one would not do: runtimes merge its weight with a scale that follows it.
    """
    return [[p for p in block.parameters() if p.ndim == 2][-2] for block in backbone.blocks]


def executed_tokens(backbone: Backbone, call: Callable[[], Any]) -> tuple[int, ...]:
    """Run ``call`` and count the tokens, of all images, that each block really fed forward.

    Args:
        backbone: parts of the model whose blocks are watched.
        call: runs the blocks, any number of times. What ``torch.compile`` or a graph runs is not
            seen.
    """
    with _Products(watched_weights(backbone)) as products, torch.no_grad():
        call()
    return tuple(products.rows)


def check_executed(backbone: Backbone, call: Callable[[], Any], wanted: Sequence[int]) -> None:
    """Refuse a run in which a block computed more or fewer tokens than a method decided.

    Args:
        backbone: as for ``executed_tokens``.
        call: runs each block once.
        wanted: number of tokens, of all images, in each block.
    """
    found = executed_tokens(backbone, call)
    if not any(found):
        raise RuntimeError(
            "no matrix product with a block's weight was seen, so its tokens cannot be counted: "
            "run without autocast, quantisation and compilation"
        )
    for block, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one != other:
            raise RuntimeError(
                f"the method is not in effect: block {block} computed {one} tokens, and the method "
                f"decided on {other}"
            )


class _Products(TorchDispatchMode):
    """Counts the rows that are multiplied with some weights; copies of a weight do not count.

    Attributes:
        rows: number of rows for each weight.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.rows = [0] * len(weights)
        self._weights = {_storage(weight): number for number, weight in enumerate(weights)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _PRODUCTS:
            for value in args:
                number = self._weights.get(_storage(value)) if isinstance(value, Tensor) else None
                if number is not None:
                    self.rows[number] += out.numel() // out.shape[-1]
        return out


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
