"""From uint8 batches to what a model is trained on: normalised, erased, mixed; on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.train.recipe import Mix

__all__ = ["Prepare"]


class Prepare(nn.Module):
    """Normalises; while training also erases parts and mixes images and labels.

    timm's mixing and erasing draw from the global generators, which every step seeds.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], mix: Mix, classes: int, batch: int
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            scaled = torch.tensor(values).view(1, -1, 1, 1) * 255
            self.register_buffer(name, scaled, persistent=False)
        self.classes, self.smoothing = classes, mix.smoothing
        self._mix = None
        if mix.mixup or mix.cutmix:
            if batch % 2:
                raise ValueError(f"mixing pairs images: data.batch must be even, got {batch}")
            self._mix = Mixup(
                mix.mixup,
                mix.cutmix,
                prob=mix.prob,
                switch_prob=mix.switch,
                label_smoothing=mix.smoothing,
                num_classes=classes,
            )
        self._erase = None
        if mix.erase:
            self._erase = RandomErasing(mix.erase, mode="pixel", device="cpu")

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` uint8."""
        return images.to(self.mean.dtype).sub_(self.mean).div_(self.std)

    def train_batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets: labels ``[B]``, or soft ones ``[B, classes]``."""
        x = self(images)
        if self._erase is not None:
            self._erase.device = x.device
            x = self._erase(x)
        if self._mix is not None:
            return self._mix(x, labels)
        if self.smoothing:
            soft = F.one_hot(labels, self.classes).to(x.dtype)
            return x, soft * (1 - self.smoothing) + self.smoothing / self.classes
        return x, labels
