"""EViT: keep the patches that the class token attends to, fuse the rest into one token.

Paper: Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022.

Scored: attention of the class token to each patch, mean over heads, in the block itself. The
others become one token, their attention-weighted sum, which is not normalised. It competes like any
other token at the next stage. Each stage keeps ``ceil(keep * current)``.

Training: recommended (fine-tuning for 30 epochs, or from scratch with the rate warmed up from 1).
The release counts a distillation token as a patch; here prefix tokens are never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.methods._class_attention import ClassAttention
from foveate.registry import register

__all__ = ["EViT"]


@register("evit")
@dataclass(eq=False, kw_only=True, repr=False)
class EViT(ClassAttention):
    """Class attention decides; inattentive patches are fused into one token."""

    relative: str = "current"
    rounding: str = "ceil"
    rest: str = "fuse"

    paper: ClassVar[str] = "Liang et al., EViT, ICLR 2022"
    summary: ClassVar[str] = "keeps what the class token attends to, fuses the rest into one token"
    training_need: ClassVar[str] = "recommended"
