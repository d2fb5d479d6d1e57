"""Callbacks of pre-training: progress curve, layers, pictures, snapshots."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from foveate.data import Source
from foveate.files import write_whole
from foveate.mim.build import open_watched
from foveate.mim.layers import ALARM, collapsing, measure_layers
from foveate.mim.method import MaskedImageModel, fixed_mask
from foveate.mim.recipe import Pretrain
from foveate.mim.reconstructions import picture, some_images
from foveate.mim.task import PretrainTask
from foveate.mim.weights import TEACHER_FILE, save_model, save_vit
from foveate.train.module import Module
from foveate.train.probe import Watched, read
from foveate.train.run import Loaders
from foveate.train.task import Task

__all__ = ["own_callbacks"]

_log = logging.getLogger(__name__)
_IMAGES = 64  # that layers are measured on
_SHOWN = 6  # that are drawn
_PATIENCE = timedelta(days=2)  # of processes, with a reading on the first of them
_HINT = "; lower mto's weights or set mto.detach_visible=true"


def own_callbacks(recipe: Pretrain, task: Task, loaders: Loaders, out: Path) -> list[Callback]:
    """Make the callbacks that the recipe asks for."""
    assert isinstance(task, PretrainTask)
    found: list[Callback] = []
    watched = open_watched(recipe, task.model.vit)
    if watched is not None:
        found.append(ProgressCurve(recipe, watched))
    splits = loaders.splits
    shown = splits.train if splits.val is None else splits.val
    if recipe.layers_every is not None:
        found.append(LayerLog(recipe, task, shown))
    if recipe.loop.pictures_every is not None:
        found.append(Reconstructions(recipe, task, shown, out / "pictures"))
    found.append(Snapshots(recipe, out / "snapshots"))
    if task.teacher is not None:
        found.append(TeacherFile(task.teacher, out / TEACHER_FILE))
    return found


class _AtEpochs(Callback):
    """Do something on the first process after some epochs, with the model in eval mode.

    The other processes wait in a group of their own with a long timeout. Waiting for gradients
    instead would time out during a probe of an hour.
    """

    every: int | None = None
    _patient: Any = None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the group."""
        if trainer.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def due(self, epoch: int, over: bool) -> bool:
        """Tell whether to act: every few epochs, and when the run is ``over``."""
        assert self.every is not None
        return over or epoch % self.every == 0

    def act(self, module: Module, model: MaskedImageModel, epoch: int) -> None:
        """Look, log, save."""
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Act if it is due, while the other processes wait."""
        assert isinstance(module, Module)
        epoch = trainer.current_epoch + 1
        over = trainer.global_step in (module.updates, trainer.max_steps)
        if not self.due(epoch, over):
            return
        if trainer.is_global_zero:
            assert isinstance(module.exported, MaskedImageModel)
            model = module.exported.eval()  # the next step sets the modes anew
            with torch.no_grad():
                self.act(module, model, epoch)
        if self._patient is not None:
            dist.barrier(group=self._patient)

    @staticmethod
    def log_now(module: Module, found: dict[str, float]) -> None:
        """Write into the log of the run, for the epoch that has just ended.

        Lightning would write them after the epoch's checkpoint; a run killed in between would lose
        them.
        """
        trainer = module.trainer
        for logger in trainer.loggers:
            row = {**found, "epoch": trainer.current_epoch}
            logger.log_metrics(row, step=trainer.global_step - 1)


class ProgressCurve(_AtEpochs):
    """Log "probe/knn" and "probe/linear", in per cent of a labelled set's evaluation images."""

    def __init__(self, recipe: Pretrain, watched: Watched) -> None:
        self.every = recipe.probe.every
        self.reading, self.watched = recipe.probe, watched

    def act(self, module: Module, model: MaskedImageModel, epoch: int) -> None:
        """Take features and measure them."""
        scores, _ = read(model.vit, self.watched, self.reading, module.device)
        found = {f"probe/{name}": score for name, score in scores.items()}
        module.watched = found
        self.log_now(module, found)


class LayerLog(_AtEpochs):
    """Log heterogeneity and the visible tokens' cosine of every layer, and raise the alarm."""

    def __init__(self, recipe: Pretrain, task: PretrainTask, source: Source) -> None:
        self.every, self.masking = recipe.layers_every, task.masking
        self.hint = "" if task.mto is None else _HINT
        self.images = some_images(task.inputs, source, _IMAGES)[0]
        self._before: list[float] = []
        self._said = False

    def act(self, module: Module, model: MaskedImageModel, epoch: int) -> None:
        """Measure on the same images with the same masks each time."""
        images = self.images.to(module.device)
        mask = fixed_mask(model, images, self.masking)
        found: dict[str, float] = {}
        networks = measure_layers(model, images, mask)
        for number, layers in enumerate(networks):
            which = f"{number}/" if len(networks) > 1 else ""
            for layer, level in enumerate(layers.heterogeneity):
                found[f"heterogeneity/{which}{layer:02d}"] = level
            found[f"cosine/{which}visible"] = layers.cosine[0]
            # The first measurement has nothing before it to have sunk from, and says nothing.
            before = self._before[number] if self._before else 1.0
            if collapsing(layers.cosine[0], before) and not self._said:
                self._said = True
                _log.warning(
                    "after epoch %d visible tokens have a mean cosine of %.3f before the first "
                    "block, above %.2f and not sinking: nearly all are the same%s",
                    *(epoch, layers.cosine[0], ALARM, self.hint),
                )
        self._before = [layers.cosine[0] for layers in networks]
        self.log_now(module, found)


class Reconstructions(_AtEpochs):
    """Draw what the model predicts of hidden patches."""

    def __init__(self, recipe: Pretrain, task: PretrainTask, source: Source, folder: Path) -> None:
        self.every, self.masking = recipe.loop.pictures_every, task.masking
        self.images = some_images(task.inputs, source, _SHOWN)[0]
        self.mean, self.std, self.folder = task.inputs.mean, task.inputs.std, folder

    def act(self, module: Module, model: MaskedImageModel, epoch: int) -> None:
        """Write one file for each epoch."""
        images: Tensor = self.images.to(module.device)
        mask = fixed_mask(model, images, self.masking)
        drawn: Any = picture(model, images, mask, self.mean, self.std)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch-{epoch:03d}.png"
        write_whole(path, lambda partial: drawn.save(partial, format="png"))


class Snapshots(_AtEpochs):
    """Keep the weights after some epochs of one schedule, for RAUC and for comparison."""

    def __init__(self, recipe: Pretrain, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder

    def due(self, epoch: int, over: bool) -> bool:
        """Tell whether the recipe keeps the weights after this epoch."""
        return self.recipe.kept(epoch)

    def act(self, module: Module, model: MaskedImageModel, epoch: int) -> None:
        """Write backbone and the rest, unless loop.max_steps cut the epoch short."""
        if module.trainer.global_step * self.recipe.loop.epochs == module.updates * epoch:
            save_model(model, self.folder / f"epoch-{epoch:04d}.safetensors")


class TeacherFile(Callback):
    """Write a teacher's ViT beside the exported one, because some authors fine-tune it."""

    def __init__(self, teacher: MaskedImageModel, path: Path) -> None:
        self.teacher, self.path = teacher, path

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save as the run ends, also if it was resumed after its last update."""
        if trainer.is_global_zero:
            save_vit(self.teacher, self.path)
