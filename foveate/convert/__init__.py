"""Load and save models: our own folders, Hugging Face folders, released checkpoints."""

from foveate.convert.folders import note_results, note_run, save
from foveate.convert.hub import push_to_hub, shared_files
from foveate.convert.loading import (
    Loaded,
    Settings,
    from_pretrained,
    load,
    open_model,
    save_plain,
)
from foveate.convert.named import open_base
from foveate.convert.origins import ORIGINS
from foveate.convert.shipped import SHIPPED, open_shipped

__all__ = [
    "ORIGINS",
    "SHIPPED",
    "Loaded",
    "Settings",
    "from_pretrained",
    "load",
    "note_results",
    "note_run",
    "open_base",
    "open_model",
    "open_shipped",
    "push_to_hub",
    "save",
    "save_plain",
    "shared_files",
]
