"""Run models in evaluation mode, and read logits from their answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.schedule import check_choice

__all__ = ["PRECISIONS", "answering", "evaluating", "logits_of"]

PRECISIONS = ("fp32", "bf16")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode; restore the mode of every module afterwards."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def answering(*models: nn.Module, precision: str = "fp32") -> Iterator[None]:
    """Set evaluation mode without gradients; restore the mode of every module afterwards.

    Args:
        models: models on one device.
        precision: "fp32", or "bf16" for automatic mixed precision.
    """
    check_choice("precision", precision, PRECISIONS)
    kind = next(models[0].parameters()).device.type
    # Not inference_mode: a training that goes on could not use what a model caches in it.
    half = torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")
    with evaluating(*models), torch.no_grad(), half:
        yield


def logits_of(answer: Any) -> Tensor:
    """Return the logits of a model's answer: itself, its field ``logits`` or its first item."""
    found = getattr(answer, "logits", answer)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"the model answers with {type(answer).__name__}, which has no logits")
    return found
