"""One pre-training run, on the same engine as fine-tuning.

Beside what every run's folder has:
snapshots/            weights after the epochs that the recipe names
model.safetensors     the backbone, for timm, foveate.load and foveate finetune
model.pretrain.safetensors  decoder, head, mask token
teacher.safetensors   the backbone of a method's teacher, if it has one
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveate.mim.build import build
from foveate.mim.callbacks import own_callbacks
from foveate.mim.recipe import Pretrain
from foveate.train.result import Result
from foveate.train.run import fit

__all__ = ["pretrain"]

_log = logging.getLogger(__name__)


def pretrain(
    recipe: Pretrain,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _log.info,
    again: str | None = None,
) -> Result:
    """Pre-train and export the backbone; return the content of result.json, and the model.

    Args:
        recipe: what to do.
        out: folder of the run; made if missing.
        resume: go on from the newest checkpoint there that can be read.
        progress: show a progress bar.
        say: is told, before the first step, what is trained on what.
        again: what to type to go on with a run that was stopped; None is --resume and its folder.
    """
    how: dict[str, Any] = {"resume": resume, "progress": progress, "say": say, "again": again}
    return fit(recipe, out, build, callbacks=own_callbacks, **how)
