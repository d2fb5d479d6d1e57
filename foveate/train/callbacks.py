"""Callbacks that show, while a method trains, how many tokens it keeps, and which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from foveate.core import ReducedViT
from foveate.data import Source, Unreadable
from foveate.data.images import as_picture
from foveate.files import write_whole
from foveate.train.module import Module

__all__ = ["Pictures", "TokenCounts"]


class TokenCounts(Callback):
    """Log after each evaluation how many tokens the blocks work on, for some of its images.

    Args:
        batches: number of batches of the evaluation to count.
    """

    def __init__(self, batches: int = 4) -> None:
        self.batches = batches
        self._counts: list[Tensor] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
        dataloader: int = 0,
    ) -> None:
        """Trace a batch."""
        assert isinstance(module, Module)
        if index >= self.batches:
            return
        trace = module.task.trace(module.exported, batch)
        if trace is not None:
            counts = trace.counts()
            self._counts.append(torch.tensor(counts, dtype=torch.float32))  # [blocks, B]

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the means."""
        if self._counts:
            means = torch.cat(self._counts, 1).mean(1).tolist()
            self._counts = []
            found = {f"tokens/block{i:02d}": n for i, n in enumerate(means)}
            module.log_dict(found, rank_zero_only=True)  # of its share of the images


class Pictures(Callback):
    """Draw every few epochs what the method does to evaluated images of different classes.

    Args:
        folder: folder for the files.
        every: number of epochs between pictures.
        source: the evaluated images.
        number: number of images.
    """

    def __init__(self, folder: Path, every: int, source: Source, number: int = 4) -> None:
        self.folder, self.every = folder, every
        self._images: dict[str, Image.Image] = {}
        if source.finished:
            raise ValueError(
                f"loop.pictures_every draws on pictures, and {source.spec} gives tensors: leave it "
                "out"
            )
        labels: set[int] = set()
        for index in range(len(source)):
            if len(self._images) == number:
                break
            if source.classes is None or source.label(index) not in labels:
                try:
                    self._images[source.name(index)] = as_picture(source.image(index))
                except Unreadable:  # the evaluation reports it
                    continue
                labels.add(source.label(index))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw on one process, also after epochs without an evaluation."""
        from foveate.viz import sheet

        assert isinstance(module, Module)
        model, epoch = module.exported, trainer.current_epoch + 1
        due = epoch % self.every == 0 and bool(self._images)
        if not due or not isinstance(model, ReducedViT) or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        model.eval()  # the next step sets the modes anew
        picture = sheet({repr(model.reducer): model}, self._images)
        path = self.folder / f"epoch-{epoch:03d}.png"
        write_whole(path, lambda partial: picture.save(partial, format="png"))
