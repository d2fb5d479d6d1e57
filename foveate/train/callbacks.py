"""What happens around the steps: running means, warm-up of the keep rate, pictures, statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor

from foveate.core import ReducedViT
from foveate.data import Source
from foveate.files import write_whole
from foveate.train.module import Module

__all__ = ["Ema", "KeepRate", "Pictures", "TokenCounts"]

_WARMUP = 10.0  # updates after which the decay of a running mean is a half


class Ema(Callback):
    """Keeps a running mean of the weights; it is evaluated, saved and exported.

    The decay grows with the updates t as t / (t + 10), up to the one that was asked for. Without
    that the mean of a short run would be little else than the weights it began with.

    Args:
        decay: share of the old mean that stays at each update, once enough of them are done.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._mean: ModelEmaV3 | None = None
        self._waiting: dict[str, Tensor] | None = None
        self._seen = 0

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin with the weights of the start, or with what a checkpoint held."""
        assert isinstance(module, Module)
        self._mean = ModelEmaV3(
            module.task.model,
            decay=self.decay,
            use_warmup=True,
            warmup_gamma=_WARMUP,
            warmup_power=1.0,
        )
        if self._waiting is not None:
            self._mean.module.load_state_dict(self._waiting)
            self._waiting = None
        module.keep_mean(self._mean.module)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Count from here: only now a resumed run knows its updates."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Follow after each update."""
        assert isinstance(module, Module) and self._mean is not None
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self._mean.update(module.task.model, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The mean itself."""
        return {} if self._mean is None else {"mean": self._mean.module.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the model is there."""
        self._waiting = state_dict.get("mean")


class KeepRate(Callback):
    """Tells the method how much of the training is done: the rate sinks, stages change."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int
    ) -> None:
        """Before every update."""
        assert isinstance(module, Module)
        self._tell(module, min(1.0, trainer.global_step / module.updates))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluate at the rate of the moment, and after the end as the model is exported."""
        assert isinstance(module, Module)
        over = trainer.state.fn != TrainerFn.FITTING
        self._tell(module, 1.0 if over else min(1.0, trainer.global_step / module.updates))

    @staticmethod
    def _tell(module: Module, progress: float) -> None:
        for model in (module.task.model, module.ema):
            if isinstance(model, ReducedViT):
                model.set_progress(progress)


class TokenCounts(Callback):
    """Logs after each evaluation how many tokens the blocks work on, over some of its images.

    Args:
        batches: of the evaluation that are counted.
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
        model = module.exported
        if isinstance(model, ReducedViT) and index < self.batches:
            counts = model.trace(module.prepare(batch["images"])).counts()
            self._counts.append(torch.tensor(counts, dtype=torch.float32))  # [blocks, B]

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the means."""
        if self._counts:
            means = torch.cat(self._counts, 1).mean(1).tolist()
            self._counts = []
            found = {f"tokens/block{i:02d}": n for i, n in enumerate(means)}
            module.log_dict(found, rank_zero_only=True)  # of its share of the images


class Pictures(Callback):
    """Draws every few epochs what the method does to the first evaluated images of some classes.

    Args:
        folder: of the files.
        every: epochs between pictures.
        source: the evaluated images.
        number: of images.
    """

    def __init__(self, folder: Path, every: int, source: Source, number: int = 4) -> None:
        self.folder, self.every = folder, every
        self._images: dict[str, Image.Image] = {}
        labels: set[int] = set()
        for index in range(len(source)):
            if len(labels) == number:
                break
            if source.label(index) not in labels:
                try:
                    self._images[source.name(index)] = _picture(source.image(index))
                except ValueError:  # unreadable; evaluation says so, if it is to
                    continue
                labels.add(source.label(index))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw, on one process; also after epochs without an evaluation."""
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


def _picture(image: Image.Image | np.ndarray) -> Image.Image:
    """A source's image, as pictures are drawn on."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
