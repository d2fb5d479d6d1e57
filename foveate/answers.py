"""The logits of whatever a model answers with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["logits_of"]


def logits_of(answer: Any) -> Tensor:
    """Return the logits of an answer: the tensor itself, its field of that name, or its first."""
    found = getattr(answer, "logits", answer)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"the model answers with {type(answer).__name__}, which has no logits")
    return found
