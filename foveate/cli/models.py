"""What commands take as MODEL: a file, a folder, a timm name, or the demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODEL_HELP", "open_models"]

MODEL_HELP = (
    "name of a timm model, checkpoint file, folder of foveate or Hugging Face, or 'demo' for the "
    "small trained model that ships with the package"
)


def open_models(
    name: str, methods: Sequence[str], *, untrained: bool = False, budget: str | None = None
) -> list[nn.Module]:
    """Open a model once for each method; the weights are shared. Without methods, as it is."""
    from foveate import api
    from foveate.convert import open_base
    from foveate.core import ReducedViT

    model = open_base(name, untrained=untrained)
    if not methods:
        return [model]
    if isinstance(model, ReducedViT):
        raise ValueError(f"{name} was saved with its method {model.reducer!r}; name no other")
    return [api.apply(model, method, budget=budget).eval() for method in methods]
