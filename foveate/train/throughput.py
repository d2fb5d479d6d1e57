"""Measure how fast a run trains: images a second, waiting time, and seconds after each epoch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from foveate.files import write_text

__all__ = ["SECONDS", "Throughput"]

SECONDS = "seconds.csv"  # not in metrics.csv, which must be equal after a resume


class Throughput(Callback):
    """Time batches, and the training as a whole without evaluations.

    On a GPU the process runs ahead of the device, so that a wait for images that the device does
    not notice counts too: the share is the most that faster images could bring. It has to be the
    last callback; otherwise the work of others after a batch, such as saving, would count as
    waiting.

    Attributes:
        path: of a CSV file with the seconds of training that were over after each epoch, resumed
            ones included; None writes none. On a CPU they are processor time divided by threads, so
            that other programs do not count; on a GPU they are those of the clock.
        batches: that were timed, on this process; the first of each epoch, for which loader and
            compiler may start up, is not.
        seconds: that they took, with everything between them.
        waited: seconds of these in which the loader had no batch yet.
        trained: seconds of training, of all epochs.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.batches = 0
        self.seconds = self.waited = self.trained = 0.0
        self._lines: dict[int, float] = {}
        self._started = 0.0
        self._asked: float | None = None  # None while the clock of batches stands
        self._begun: float | None = None  # None while that of training does
        self._device = torch.device("cpu")

    def facts(self, images: int) -> dict[str, float]:
        """What the result says, for batches of so many images over all processes."""
        if not self.batches or not self.seconds:
            return {}
        return {
            "images_per_second": float(f"{self.batches * images / self.seconds:.3g}"),
            "share_waiting_for_images": round(self.waited / self.seconds, 4),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming."""
        return {"trained": self.trained + self._running(), "lines": self._lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore that state."""
        self.trained, self._lines = state["trained"], dict(state["lines"])

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock."""
        self._start(module)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int
    ) -> None:
        """Stop waiting: a batch has arrived."""
        if self._begun is None:  # gone on inside an epoch
            self._start(module)
        if self._asked is not None:
            self.waited += time.perf_counter() - self._asked

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Start waiting for the next batch; after the last one the epoch's evaluation follows."""
        if self._asked is None:
            _wait_for(module.device)
            self._started = time.perf_counter()
        else:
            self.batches += 1
        self._asked = time.perf_counter()
        loop = trainer.fit_loop.epoch_loop
        if trainer.is_last_batch or loop.global_step == loop.max_steps:
            self._stop()
            self._lines[trainer.current_epoch + 1] = self.trained  # the epoch's checkpoint has it

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clocks while images are evaluated."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clocks again if the epoch is not over."""
        if trainer.training and not trainer.is_last_batch:
            self._start(module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the time of the epoch."""
        self._stop()  # of an epoch that was stopped by hand
        self._lines[trainer.current_epoch + 1] = self.trained
        if self.path is not None and trainer.is_global_zero:
            lines = (f"{epoch},{seconds:.3f}\n" for epoch, seconds in self._lines.items())
            write_text(self.path, "epoch,seconds\n" + "".join(lines))

    def _start(self, module: LightningModule) -> None:
        self._device = module.device
        self._begun = _clock(self._device)

    def _running(self) -> float:
        return 0.0 if self._begun is None else _clock(self._device) - self._begun

    def _stop(self) -> None:
        if self._asked is not None:
            _wait_for(self._device)
            self.seconds += time.perf_counter() - self._started
            self._asked = None
        self.trained += self._running()
        self._begun = None


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    _wait_for(device)
    return time.perf_counter()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
