"""Checkpoints for resuming: they are written whole, the last few are kept, damage is noticed."""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from foveate.files import write_whole

__all__ = ["Checkpoints", "WholeFiles", "any_checkpoint", "newest", "save_whole"]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"update-(\d+)\.ckpt")


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Save weights under another name, flush them to the disk, and rename the file."""

    def write(partial: str) -> None:
        torch.save(content, partial)
        with open(partial, "rb+") as file:  # the name must not reach the disk before the data
            os.fsync(file.fileno())

    try:
        write_whole(path, write)
    except RuntimeError as error:  # torch's writer raises this when the disk is full
        reason = str(error).split("\n", 1)[0]
        raise OSError(errno.EIO, f"writing {path.name} failed ({reason})") from error


class WholeFiles(TorchCheckpointIO):
    """Write each checkpoint under another name, flush it to the disk, and rename it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; the older files stay if the process is killed meanwhile."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_whole(checkpoint, Path(path))


class Checkpoints(Callback):
    """Saves at the end of every epoch and every so many updates; keeps the last few.

    Args:
        folder: folder of the files.
        every: number of updates between checkpoints inside an epoch; None saves only at its end.
        keep: number of files to keep.
    """

    def __init__(self, folder: Path, every: int | None, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self._saved = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove checkpoints later than the one that was resumed from: they are damaged."""
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            # Otherwise they would count among those to keep, and push out whole ones.
            for path in _found(self.folder):
                if _update(path) > self._saved:
                    path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Save inside an epoch, between updates, but not after its last batch."""
        step = trainer.global_step
        due = step == trainer.max_steps or (self.every and step and step % self.every == 0)
        if due and step != self._saved and not self._epoch_over(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save after the epoch's evaluation, unless loop.max_steps cut the epoch short."""
        if self._epoch_over(trainer):
            self.save(trainer)

    @staticmethod
    def _epoch_over(trainer: Trainer) -> bool:
        return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint and remove the oldest beyond those to keep."""
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.folder / f"update-{self._saved:08d}.ckpt")
        if trainer.is_global_zero:
            for path in _found(self.folder)[self.keep :]:
                path.unlink(missing_ok=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that can be read, and its content; warn of damaged ones.

    None if there is no checkpoint at all, ValueError if none can be read.
    """
    found = _found(folder)
    if not found:
        return None
    for path in found:
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a truncated zip raises many kinds
            reason = str(error).split("\n", 1)[0]
            _log.warning("%s is damaged (%s); the one before it is used", path, reason)
    raise ValueError(f"none of the checkpoints in {folder} can be read")


def any_checkpoint(folder: Path) -> bool:
    """Tell whether there is a checkpoint, whole or not."""
    return bool(_found(folder))


def _found(folder: Path) -> list[Path]:
    """Return the checkpoints, the newest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=_update, reverse=True)


def _update(path: Path) -> int:
    """Return the number of updates before a checkpoint was written."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
