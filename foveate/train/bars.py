"""Lightning's progress bars, with short names for the numbers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

__all__ = ["LineBar", "RichBar"]

# Values of the log to show, in this order; the log keeps its own names.
_SHOWN = {"train/loss": "loss", "train/accuracy": "train %", "val/accuracy": "val %"}


class _Named:
    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return only losses and accuracies."""
        found = super().get_metrics(trainer, module)  # type: ignore[misc]
        return {_SHOWN[name]: value for name, value in found.items() if name in _SHOWN}


class RichBar(_Named, RichProgressBar):
    """A progress bar for terminals."""


class LineBar(_Named, TQDMProgressBar):
    """A progress bar for log files."""
