"""Fine-tuning a plain ViT, on whole images or with random patches hidden.

Masked fine-tuning: Shi and Wang, "Bridging The Gaps Between Token Pruning and Full Pre-training via
Masked Fine-tuning". Every image draws a share of patches to hide; the model classifies from the
rest, and a teacher that sees the whole image may add a loss. The teacher gets the same augmented
image; the KL term is KL(teacher || student), summed over classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from foveate.backbones import backbone_for, image_settings
from foveate.convert import save_plain
from foveate.core import dense
from foveate.core.evaluation import logits_of
from foveate.core.losses import distillation, hard_distillation
from foveate.files import write_text
from foveate.train.draws import Draws
from foveate.train.images import ClassificationTask
from foveate.train.masking import draw_masks, kept_patches
from foveate.train.recipe import Data, Distill, Masking, Mix

__all__ = ["FinetuneTask"]


class FinetuneTask(ClassificationTask):
    """Classification loss on masked or whole images, and distillation if there is a teacher."""

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        data: Data | None = None,
        mix: Mix | None = None,
        *,
        masking: Masking | None = None,
        distill: Distill | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.masking, self.distill = masking or Masking(), distill or Distill()
        if (teacher is None) != (self.distill.kind == "none"):
            raise ValueError(f"distill.kind={self.distill.kind} and a teacher go together")
        weights = {"distill": self.distill.weight}
        super().__init__(model, classes, data, mix, weights=weights, teacher=teacher)
        if self.masking.ratios:
            self._backbone.check_takes_masks()
            spec = dense(self._backbone).backbone.spec  # refuses what cannot be driven
            patches, most = spec.grid[0] * spec.grid[1], max(self.masking.ratios)
            if spec.pools_patches and not kept_patches(patches, most):
                raise ValueError(
                    f"masking.ratios holds {most:g}, which leaves nothing of {patches} patches to "
                    "a model that pools them: use model.pool=token, or a smaller ratio"
                )

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Return the loss "class" and, with a teacher, "distill"."""
        images, targets = self.mixed(batch)
        logits = self.logits(images, draws)
        losses = {"class": self.classified(logits, targets)}
        if self.teacher is not None:
            with torch.no_grad():
                wanted = logits_of(self.teacher(images))
            if self.distill.kind == "soft":
                losses["distill"] = distillation(logits, wanted, self.distill.temperature)
            else:
                losses["distill"] = hard_distillation(logits, wanted)
        return losses

    def logits(self, images: Tensor, draws: Draws) -> Tensor:
        if not self.masking.ratios:
            return logits_of(self.model(images))
        driven = dense(self._backbone)
        driven.mode = "packed" if self.masking.backend == "bucket" else "masked"
        rows, columns = driven.backbone.grid_of(images)
        keep = draw_masks(
            self.masking.ratios,
            len(images),
            rows * columns,
            draws,
            stratified=self.masking.stratified,
        )
        return driven.run(images, keep).logits

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write the model's own keys, for its library and ``foveate.load`` alike."""
        if hasattr(model, "save_pretrained"):
            path = folder / "model"
            exporting: Any = model
            exporting.save_pretrained(path)
            _save_preprocessing(model, path)
            return path
        path = folder / "model.safetensors"
        save_plain(model, path)
        return path


def _save_preprocessing(model: nn.Module, folder: Path) -> None:
    """Write how images are prepared, where transformers and ``foveate.load`` look for it."""
    spec, said = backbone_for(model).spec, image_settings(model)
    height, width = (n * side for n, side in zip(spec.grid, spec.patch, strict=True))
    config = {
        "image_processor_type": "BitImageProcessor",
        **{"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True},
        "size": {"shortest_edge": int(min(height, width) / said["crop_pct"])},
        "crop_size": {"height": height, "width": width},
        "resample": int(Image.Resampling[said["interpolation"].upper()]),
        "rescale_factor": 1 / 255,
        "image_mean": said["mean"],
        "image_std": said["std"],
    }
    write_text(folder / "preprocessor_config.json", json.dumps(config, indent=1) + "\n")
