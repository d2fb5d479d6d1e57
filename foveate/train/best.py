"""Keep the best weights of a run by its validation score; stop a run that no longer improves."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from foveate.core import Reducer
from foveate.train.checkpoints import save_whole
from foveate.train.module import Module
from foveate.train.sharded import whole_state

__all__ = ["Best"]

_log = logging.getLogger(__name__)


class Best(Callback):
    """Keeps the weights that did best on the validation images.

    While a method's rate is still falling, the model uses more tokens than later, so these scores
    do not count.

    Args:
        file: file of the weights.
        patience: number of evaluations without a better score after which the run stops; None never
            stops it.
    """

    def __init__(self, file: Path, patience: int | None = None) -> None:
        self.file, self.patience = file, patience
        self.value: float | None = None
        self.update = -1
        self._since = 0

    @property
    def _over(self) -> bool:
        return self.patience is not None and self._since >= self.patience

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep a run stopped that ran out of patience before it was resumed."""
        if self._over:
            trainer.should_stop = True
            if trainer.is_global_zero:
                _log.warning(
                    "the run ended at update %d because loop.patience=%d was used up, and stays "
                    "ended: --resume FOLDER loop.patience=null, or a larger number, trains on",
                    *(trainer.global_step, self.patience),
                )

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare the newest score with the best."""
        assert isinstance(module, Module)
        model = module.exported
        reducer = getattr(model, "reducer", None)  # of a reduced ViT, or of a model around one
        if isinstance(reducer, Reducer) and not reducer.settled:
            return
        value, higher = module.judged()
        better = self.value is None or (value > self.value if higher else value < self.value)
        if math.isnan(value) or not better:
            self._since += 1
            trainer.should_stop |= self._over
            return
        self.value, self.update, self._since = value, trainer.global_step, 0
        if trainer.state.fn != TrainerFn.FITTING:
            # After the last step these weights are exported anyway, and the file must stay as the
            # last checkpoint describes it.
            return
        state = whole_state(model)  # all processes have to ask
        if trainer.is_global_zero:
            save_whole(state, self.file)

    def state_dict(self) -> dict[str, Any]:
        """Return the score and where it was reached."""
        return {"value": self.value, "update": self.update, "since": self._since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore that score."""
        self.value, self.update = state_dict["value"], state_dict["update"]
        self._since = state_dict["since"]

    def restore(self, model: nn.Module) -> bool:
        """Give a model the best weights; False if they are gone."""
        if not self.file.is_file():
            return False
        model.load_state_dict(torch.load(self.file, map_location="cpu", weights_only=True))
        return True
