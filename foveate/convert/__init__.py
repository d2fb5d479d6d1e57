"""Checkpoints that others released: recognised, translated, loaded."""

from foveate.convert.loading import Loaded, Settings, load, open_model, save_plain
from foveate.convert.origins import ORIGINS

__all__ = ["ORIGINS", "Loaded", "Settings", "load", "open_model", "save_plain"]
