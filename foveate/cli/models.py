"""What commands take as MODEL: a file, a folder, a timm name, or the demo."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODEL_HELP", "open_base", "open_models"]

MODEL_HELP = (
    "a checkpoint file, a folder of foveate or Hugging Face, a name of timm, or 'demo' for the "
    "small trained model that ships with the package"
)


def open_base(name: str, *, untrained: bool = False) -> nn.Module:
    """Open a model in evaluation mode; one with a method of its own comes with it.

    Args:
        name: as MODEL_HELP says.
        untrained: take a timm model with random weights instead of fetching its own.
    """
    if name == "demo":
        from foveate.data.demo import demo_vit

        return demo_vit()
    if Path(name).exists():
        from foveate.convert import Settings, open_model

        return open_model(name, None, None, {}, Settings()).model.eval()

    import timm

    if ":" in name or not timm.is_model(name):
        near = difflib.get_close_matches(
            name, timm.list_models("*vit*") + timm.list_models("*dei*")
        )
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{name} is no file, no folder and no model that timm knows{hint}")
    if untrained:
        return timm.create_model(name, pretrained=False).eval()
    try:
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the hub, the network and timm raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"no weights for {name}: {reason}. --untrained runs it with random ones"
        ) from error


def open_models(
    name: str, methods: Sequence[str], *, untrained: bool = False, budget: str | None = None
) -> list[nn.Module]:
    """Open a model once for each method; the weights are shared. Without methods, as it is."""
    from foveate import api
    from foveate.core import ReducedViT

    model = open_base(name, untrained=untrained)
    if not methods:
        return [model]
    if isinstance(model, ReducedViT):
        raise ValueError(f"{name} was saved with its method {model.reducer!r}; name no other")
    return [api.apply(model, method, budget=budget).eval() for method in methods]
