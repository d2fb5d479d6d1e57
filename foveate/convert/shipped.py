"""Open the small trained models that ship with the package, by the names that commands know."""

from __future__ import annotations

from importlib.resources import as_file, files

from torch import nn

from foveate.convert.loading import load
from foveate.data.demo import demo_vit

__all__ = ["SHIPPED", "open_shipped"]

# What was trained: "model" is a plain model, "whole" a model with its method at keep 0.7, "gates"
# only the method's gates on the frozen demo model, and "detector" a detector with its method.
SHIPPED = {
    "demo": "model",
    "demo_dynamicvit": "whole",
    "demo_svit": "whole",
    "demo_spvit": "gates",
    "demo_static": "gates",
    "demo_detector": "detector",
}


def open_shipped(name: str) -> nn.Module:
    """Open a model that ships, in evaluation mode."""
    if SHIPPED[name] == "model":
        return demo_vit()
    with as_file(files("foveate.data").joinpath("files", name)) as folder:
        opened: nn.Module = load(folder, demo_vit() if SHIPPED[name] == "gates" else None)
    return opened.eval()
