"""Attention: drop the patches that the class token attends to least. A control without training.

Paper: the "Top-K" baseline of Haurum et al., "Which Tokens to Use? Investigating Token Reduction
in Vision Transformers", ICCV Workshops 2023.

Scored: attention of the class token, mean over heads. The others are dropped. Stage s keeps
``floor(N * keep**s)``. Training: none needed; fine-tuning helps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.methods._class_attention import ClassAttention
from foveate.registry import register

__all__ = ["Attention"]


@register("attention")
@dataclass(eq=False, kw_only=True, repr=False)
class Attention(ClassAttention):
    """Class-attention top-k."""

    paper: ClassVar[str] = "Top-K baseline of Haurum et al., Which Tokens to Use?, ICCVW 2023"
    summary: ClassVar[str] = "drops what the class token attends to least (control)"
