"""How many images a second a run trains on, and how much of its time it waits for them."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Throughput"]


class Throughput(Callback):
    """Times batches, but the first of each epoch, for which loader and compiler may start up.

    On a GPU the process runs ahead of the device, so that a wait for images that the device does
    not notice counts too: the share is the most that faster images could bring. It has to be the
    last of the callbacks, or what these do after a batch, such as saving, would be waiting too.

    Attributes:
        batches: that were timed, on this process.
        seconds: that they took, with everything between them.
        waited: seconds of these in which the loader had no batch yet.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.seconds = self.waited = 0.0
        self._started = 0.0
        self._asked: float | None = None  # None while the clock stands

    def facts(self, images: int) -> dict[str, float]:
        """What the result says, for batches of so many images over all processes."""
        if not self.batches or not self.seconds:
            return {}
        return {
            "images_per_second": round(self.batches * images / self.seconds, 1),
            "share_waiting_for_images": round(self.waited / self.seconds, 4),
        }

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int
    ) -> None:
        """A batch has come."""
        if self._asked is not None:
            self.waited += time.perf_counter() - self._asked

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The next batch is asked for after this."""
        if self._asked is None:
            _wait_for(module.device)
            self._started = time.perf_counter()
        else:
            self.batches += 1
        self._asked = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clock while images are evaluated."""
        self._stop(module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clock for what follows an epoch."""
        self._stop(module)

    def _stop(self, module: LightningModule) -> None:
        if self._asked is None:
            return
        _wait_for(module.device)
        self.seconds += time.perf_counter() - self._started
        self._asked = None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
