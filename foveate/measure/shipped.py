"""The small trained models that ship with the package, by the names that commands know."""

from __future__ import annotations

from importlib.resources import as_file, files

from torch import nn

from foveate.convert import load
from foveate.data.demo import demo_vit
from foveate.train.build import open_start

__all__ = ["SHIPPED", "open_any"]

# What was trained of each: the model, the model with its method at keep 0.7, the method's gates
# alone on the frozen demo model, or a detector with its method.
SHIPPED = {
    "demo": "model",
    "demo_dynamicvit": "whole",
    "demo_svit": "whole",
    "demo_spvit": "gates",
    "demo_static": "gates",
    "demo_detector": "detector",
}


def open_any(name: str) -> nn.Module:
    """Open a model that ships, or a checkpoint or folder, in evaluation mode."""
    if SHIPPED.get(name, "model") == "model":
        return open_start(name).eval()
    with as_file(files("foveate.data").joinpath("files", name)) as folder:
        opened: nn.Module = load(folder, demo_vit() if SHIPPED[name] == "gates" else None)
    return opened.eval()
