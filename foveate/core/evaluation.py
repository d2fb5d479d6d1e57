"""Models under evaluation: their mode, and their answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["evaluating", "logits_of"]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def logits_of(answer: Any) -> Tensor:
    """The logits of a model's answer: the tensor itself, a field of that name, or the first."""
    found = getattr(answer, "logits", answer)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"the model answers with {type(answer).__name__}, which has no logits")
    return found
