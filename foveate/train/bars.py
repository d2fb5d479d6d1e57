"""Progress bars: Lightning's, with the numbers named as briefly as a line needs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

__all__ = ["LineBar", "RichBar"]

# Of what the log has, in this order; the log keeps its own names.
_SHOWN = {"train/loss": "loss", "train/accuracy": "train %", "val/accuracy": "val %"}


class _Named:
    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return loss and accuracies alone."""
        found = super().get_metrics(trainer, module)  # type: ignore[misc]
        return {_SHOWN[name]: value for name, value in found.items() if name in _SHOWN}


class RichBar(_Named, RichProgressBar):
    """For terminals."""


class LineBar(_Named, TQDMProgressBar):
    """For log files."""
