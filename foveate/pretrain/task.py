"""Pre-training as a job of the engine: masks, the method's loss, and what MTO adds."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torchmetrics import MeanMetric

from foveate.pretrain.masks import Hiding, Mask
from foveate.pretrain.method import MaskedImageModel
from foveate.pretrain.mto import Mto, mto_losses
from foveate.pretrain.weights import save_model
from foveate.train.draws import Draws
from foveate.train.scores import Scores
from foveate.train.task import Task

__all__ = ["PretrainTask", "fixed_mask"]

_FIXED = 2**31  # steps that no run reaches: masks of evaluation are drawn as of these


class PretrainTask(Task):
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
    ) -> None:
        self.mto = mto if mto is not None and mto.active else None
        if self.mto is not None:
            self.mto.check_depth(model.depth)
        super().__init__(model, {} if self.mto is None else self.mto.weights_at(0.0))
        self.masking = (masking or Hiding()).filled(model.mask_kind, model.mask_ratio)
        spec = model.backbone.spec
        hidden = self.masking.count(spec.grid, spec.patch)  # refuses what cannot be
        if self.mto is not None and (seen := spec.grid[0] * spec.grid[1] - hidden) < 2:
            raise ValueError(
                f"masked token optimisation compares visible patches, and {seen} is too few: lower "
                "mask.ratio, or make images larger or patches smaller"
            )
        self.seed = seed

    def forward(self, images: Tensor, targets: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Losses of the method and of MTO; targets are not looked at."""
        backbone = self.model.backbone
        grid = backbone.grid_of(images)
        mask = self.masking.draw(len(images), grid, backbone.spec.patch, draws)
        found = self.model(images, mask, states=self.mto is not None)
        losses = found.losses
        if self.mto is not None:
            losses = losses | mto_losses(found.states, mask, self.mto)
        return losses

    def advance(self, progress: float) -> None:
        """Let MTO's weights grow."""
        if self.mto is not None:
            self.weights = self.mto.weights_at(progress)

    def scores(self, classes: int) -> Scores:
        """Loss on evaluation images."""
        return Reconstruction(self.masking, self.seed)

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write the backbone for timm and everything else, and the rest beside it."""
        assert isinstance(model, MaskedImageModel)
        path = folder / "model.safetensors"
        save_model(model, path)
        return path


class Reconstruction(Scores):
    """The method's own loss on evaluation images, with masks that stay the same."""

    shown = "loss"

    def __init__(self, masking: Hiding, seed: int) -> None:
        super().__init__()
        self.masking, self.seed = masking, seed
        self.metric = MeanMetric()

    def update(self, model: nn.Module, images: Tensor, labels: Tensor, index: int) -> None:
        """Mean over images of the sum of the losses."""
        assert isinstance(model, MaskedImageModel)
        mask = fixed_mask(model, images, self.masking, self.seed, index)
        losses = model(images, mask).losses
        self.metric.update(sum(losses.values()), weight=len(images))

    def compute(self) -> dict[str, float]:
        """The mean."""
        found = {"loss": float(self.metric.compute())}
        self.metric.reset()
        return found


def fixed_mask(
    model: MaskedImageModel, images: Tensor, masking: Hiding, seed: int = 0, index: int = 0
) -> Mask:
    """Masks for looking at a model: the same for the same batch, apart from those of training."""
    backbone = model.backbone
    draws = Draws(seed, 0, _FIXED + index, device=images.device)
    return masking.draw(len(images), backbone.grid_of(images), backbone.spec.patch, draws)
