"""foveate makes vision transformers look only where it matters."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.api import apply, unwrap
    from foveate.convert import from_pretrained, load, push_to_hub, save
    from foveate.core import Schedule
    from foveate.exports import export
    from foveate.facts import count, describe
    from foveate.jobs import (
        adapt,
        detect,
        evaluate,
        finetune,
        pipeline,
        pretrain,
        probe,
        reduce,
        segment,
    )
    from foveate.predictions import Predictions, predict
    from foveate.registry import list_methods
    from foveate.tuning import tune

__all__ = [
    "Predictions",
    "Schedule",
    "adapt",
    "apply",
    "count",
    "describe",
    "detect",
    "evaluate",
    "export",
    "finetune",
    "from_pretrained",
    "list_methods",
    "load",
    "pipeline",
    "predict",
    "pretrain",
    "probe",
    "push_to_hub",
    "reduce",
    "save",
    "segment",
    "tune",
    "unwrap",
]

_HOMES = {
    "Predictions": "predictions",
    "Schedule": "core",
    "adapt": "jobs",
    "apply": "api",
    "count": "facts",
    "describe": "facts",
    "detect": "jobs",
    "evaluate": "jobs",
    "export": "exports",
    "finetune": "jobs",
    "from_pretrained": "convert",
    "list_methods": "registry",
    "load": "convert",
    "pipeline": "jobs",
    "pretrain": "jobs",
    "probe": "jobs",
    "push_to_hub": "convert",
    "reduce": "jobs",
    "predict": "predictions",
    "save": "convert",
    "segment": "jobs",
    "tune": "tuning",
    "unwrap": "api",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used: torch takes seconds, and ``foveate --help`` needs none."""
    if name in _HOMES:
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
