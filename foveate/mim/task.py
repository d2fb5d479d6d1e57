"""The task of pre-training: masks, the method's loss, its teacher, and the losses of MTO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from foveate.backbones import image_settings, set_image_settings
from foveate.data import Transform
from foveate.mim.masks import Hiding
from foveate.mim.method import MaskedImageModel, fixed_mask
from foveate.mim.mto import Mto, mto_losses
from foveate.mim.teacher import SecondView, TaughtModel, follow, make_teacher
from foveate.mim.weights import save_model
from foveate.train.draws import Draws
from foveate.train.images import ImageTask
from foveate.train.recipe import Data

__all__ = ["PretrainTask"]


class PretrainTask(ImageTask):
    """The losses of a method on masked images, and of MTO if it is on.

    Args:
        model: the method with its ViT.
        masking: settings of the masks; None takes the method's own.
        mto: options of MTO; None turns it off.
        seed: seed of the masks in evaluation.
        data: what the recipe says of images.
        epochs: length of the run, for settings that change during it.
        teacher: teacher of the method, if it has one; None makes a copy of the model.
    """

    model: MaskedImageModel
    teacher: TaughtModel | None

    def __init__(
        self,
        model: MaskedImageModel,
        masking: Hiding | None = None,
        mto: Mto | None = None,
        seed: int = 0,
        data: Data | None = None,
        epochs: int = 1,
        teacher: TaughtModel | None = None,
    ) -> None:
        self.mto = mto if mto is not None and mto.active else None
        if self.mto is not None:
            self.mto.check_depth(model.depth)
        if isinstance(model, TaughtModel):
            teacher = make_teacher(model, teacher)
        elif teacher is not None:
            raise ValueError(f"{model.name} has no teacher: leave it out")
        super().__init__(model, data, vit=model.vit, teacher=teacher)
        if teacher is not None:  # it sees the student's images, and its file has to say how
            set_image_settings(teacher.vit, image_settings(model.vit))
        self.masking = (masking or Hiding()).filled(model.hiding)
        spec = model.backbone.spec
        hidden = self.masking.count(spec.grid, spec.patch)  # refuses what cannot be
        if hidden < model.fewest_hidden:
            raise ValueError(
                f"{model.name} compares hidden patches of an image, and {hidden} is too few: raise "
                "mask.ratio, or make images larger or patches smaller"
            )
        if self.mto is not None and (seen := spec.grid[0] * spec.grid[1] - hidden) < 2:
            raise ValueError(
                f"masked token optimisation compares visible patches, and {seen} is too few: lower "
                "mask.ratio, or make images larger or patches smaller"
            )
        self.seed, self.epochs = seed, epochs
        self.set_progress(0.0, model)

    def transforms(self) -> tuple[Transform, Transform]:
        """Return the recipe's augmentation, with the view that only the teacher sees."""
        training, evaluation = super().transforms()
        view = self.model.view() if isinstance(self.model, TaughtModel) else None
        return training if view is None else SecondView(training, view), evaluation

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Return the losses of the method and of MTO; labels are not used."""
        images, backbone = self.pixels(batch), self.model.backbone
        grid = backbone.grid_of(images)
        mask = self.masking.draw(len(images), grid, backbone.spec.patch, draws)
        whole = self.pixels({"image": batch["view"]}) if "view" in batch else images
        found = self.model(images, mask, states=self.mto is not None, **self._taught(whole))
        losses = found.losses
        if self.mto is not None:
            losses = losses | mto_losses(found.states, mask, self.mto)
        return losses

    def _taught(self, images: Tensor) -> dict[str, Tensor]:
        """Return the teacher's targets for whole images, for the model's forward pass."""
        return {} if self.teacher is None else {"target": self.teacher.target(images)}

    def set_progress(self, progress: float, model: nn.Module) -> None:
        """Increase the weights of losses, and slow a teacher down."""
        self.weights = {} if self.mto is None else self.mto.weights_at(progress)
        if isinstance(self.model, TaughtModel):
            self.weights |= self.model.weights_at(progress, self.epochs)
            self._momentum = self.model.momentum_at(progress, self.epochs)

    def after_update(self) -> None:
        """Move a teacher towards its student."""
        if self.teacher is not None:
            follow(self.teacher, self.model, self._momentum)

    def train(self, mode: bool = True) -> PretrainTask:
        """Set the mode; some teachers are in training mode with their student."""
        super().train(mode)
        if self.teacher is not None and self.teacher.teacher_trains:
            self.teacher.train(mode)
        return self

    def metrics(self) -> dict[str, Metric]:
        """Return a metric for the method's own loss on evaluation images, with fixed masks."""
        return {"loss": MeanMetric(nan_strategy=float("nan"))}  # the default leaves them out

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        """Add the sum of the losses, whose mean over images is reported."""
        assert isinstance(model, MaskedImageModel)
        images = self.pixels(batch)
        mask = fixed_mask(model, images, self.masking, self.seed, number)
        losses = model(images, mask, **self._taught(images)).losses
        metrics["loss"].update(sum(losses.values()), weight=len(images))

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write the backbone as a timm checkpoint, and the rest beside it."""
        assert isinstance(model, MaskedImageModel)
        path = folder / "model.safetensors"
        save_model(model, path)
        return path
