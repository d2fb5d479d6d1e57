"""Load and save models: our own folders, Hugging Face folders, released checkpoints."""

from foveate.convert.folders import save
from foveate.convert.loading import Loaded, Settings, load, open_model, save_plain
from foveate.convert.named import open_base
from foveate.convert.origins import ORIGINS

__all__ = [
    "ORIGINS",
    "Loaded",
    "Settings",
    "load",
    "open_base",
    "open_model",
    "save",
    "save_plain",
]
