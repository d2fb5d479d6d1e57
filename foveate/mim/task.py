"""Pre-training as a job of the engine: masks, the method's loss, and what MTO adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from foveate.mim.masks import Hiding, Mask
from foveate.mim.method import MaskedImageModel
from foveate.mim.mto import Mto, mto_losses
from foveate.mim.weights import save_model
from foveate.train.draws import Draws
from foveate.train.images import ImageTask
from foveate.train.recipe import Data

__all__ = ["PretrainTask", "fixed_mask"]

_FIXED = 2**31  # steps that no run reaches: masks of evaluation are drawn as of these


class PretrainTask(ImageTask):
    """Losses of a method on masked images, and of MTO if there is any.

    Attributes:
        model: the method with its ViT.
        masking: how patches are hidden.
        mto: its choices; None is without.
    """

    model: MaskedImageModel

    def __init__(
        self,
        model: MaskedImageModel,
        masking: Hiding | None = None,
        mto: Mto | None = None,
        seed: int = 0,
        data: Data | None = None,
    ) -> None:
        self.mto = mto if mto is not None and mto.active else None
        if self.mto is not None:
            self.mto.check_depth(model.depth)
        weights = {} if self.mto is None else self.mto.weights_at(0.0)
        super().__init__(model, data, vit=model.vit, weights=weights)
        self.masking = (masking or Hiding()).filled(model.mask_kind, model.mask_ratio)
        spec = model.backbone.spec
        hidden = self.masking.count(spec.grid, spec.patch)  # refuses what cannot be
        if self.mto is not None and (seen := spec.grid[0] * spec.grid[1] - hidden) < 2:
            raise ValueError(
                f"masked token optimisation compares visible patches, and {seen} is too few: lower "
                "mask.ratio, or make images larger or patches smaller"
            )
        self.seed = seed

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Losses of the method and of MTO; targets are not looked at."""
        images, backbone = self.pixels(batch), self.model.backbone
        grid = backbone.grid_of(images)
        mask = self.masking.draw(len(images), grid, backbone.spec.patch, draws)
        found = self.model(images, mask, states=self.mto is not None)
        losses = found.losses
        if self.mto is not None:
            losses = losses | mto_losses(found.states, mask, self.mto)
        return losses

    def set_progress(self, progress: float, model: nn.Module) -> None:
        """Let MTO's weights grow."""
        if self.mto is not None:
            self.weights = self.mto.weights_at(progress)

    def metrics(self) -> dict[str, Metric]:
        """The method's own loss on evaluation images, with masks that stay the same."""
        return {"loss": MeanMetric(nan_strategy=float("nan"))}  # the default leaves them out

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        """Mean over images of the sum of the losses."""
        assert isinstance(model, MaskedImageModel)
        images = self.pixels(batch)
        mask = fixed_mask(model, images, self.masking, self.seed, number)
        metrics["loss"].update(sum(model(images, mask).losses.values()), weight=len(images))

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write the backbone for timm and everything else, and the rest beside it."""
        assert isinstance(model, MaskedImageModel)
        path = folder / "model.safetensors"
        save_model(model, path)
        return path


def fixed_mask(
    model: MaskedImageModel, images: Tensor, masking: Hiding, seed: int = 0, index: int = 0
) -> Mask:
    """Masks for looking at a model: the same for the same batch, apart from those of training."""
    backbone = model.backbone
    draws = Draws(seed, 0, _FIXED + index, device=images.device)
    return masking.draw(len(images), backbone.grid_of(images), backbone.spec.patch, draws)
