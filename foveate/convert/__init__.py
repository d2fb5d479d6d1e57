"""Load and save models: our own folders, Hugging Face folders, released checkpoints."""

from foveate.convert.folders import save
from foveate.convert.loading import Loaded, Settings, load, open_model, save_plain
from foveate.convert.named import open_base
from foveate.convert.origins import ORIGINS
from foveate.convert.shipped import SHIPPED, open_shipped

__all__ = [
    "ORIGINS",
    "SHIPPED",
    "Loaded",
    "Settings",
    "load",
    "open_base",
    "open_model",
    "open_shipped",
    "save",
    "save_plain",
]
