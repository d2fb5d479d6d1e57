"""The recipe of pre-training: the parts of other recipes, masks, MTO, and measurements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from foveate.data.splits import NONE
from foveate.mim.masks import Hiding
from foveate.mim.mto import Mto
from foveate.train.recipe import Model, Reading, Recipe

__all__ = ["Pretrain", "Watch"]


@dataclass(kw_only=True)
class Watch(Reading):
    """Frozen features that are measured every few epochs, to show how good the backbone is.

    Attributes:
        data: labelled data set to read, in the form of data.train; None reads none.
        every: number of epochs from one reading to the next; the last epoch is always read.
        limit: number of training images whose features are taken; None takes all.
        val_limit: number of validation images whose features are taken; None takes all.
        image_batch: number of images in one step of the backbone.
    """

    data: str | None = None
    every: int = 10
    limit: int | None = None
    val_limit: int | None = None
    image_batch: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"probe.every must be at least 1, got {self.every}")


@dataclass(kw_only=True)
class Pretrain(Recipe):
    """Pre-training by masked image modelling.

    Attributes:
        model: the ViT to train, and its first weights.
        method: "mae", "simmim", "bootmae" or "conmim".
        options: options of the method, such as options.decoder_depth=4.
        mask: which patches are hidden.
        mto: masked token optimisation; None turns it off.
        probe: the progress curve.
        snapshots: epochs whose weights are kept: a number N keeps those of every Nth epoch, a list
            those of its epochs.
        layers_every: number of epochs between measurements of heterogeneity, layer by layer; None
            measures none.
    """

    model: Model
    method: str = "mae"
    options: dict[str, Any] = field(default_factory=dict)
    mask: Hiding = field(default_factory=Hiding)
    mto: Mto | None = None
    probe: Watch = field(default_factory=Watch)
    snapshots: int | tuple[int, ...] = ()
    layers_every: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.snapshots, list):
            self.snapshots = tuple(self.snapshots)
        for name, value in (("snapshots", self.snapshots), ("layers_every", self.layers_every)):
            numbers = value if isinstance(value, tuple) else (value,)
            if any(number is not None and number < 1 for number in numbers):
                raise ValueError(f"{name} are epochs from 1 on, got {value}")
        if self.optim.frozen_epochs or self.optim.backbone_scale != 1:
            raise ValueError(
                "optim.frozen_epochs and optim.backbone_scale are for training with a method: in "
                "pre-training all parameters learn together"
            )
        if self.loop.patience is not None and self.data.val == NONE:
            raise ValueError(
                "loop.patience waits for validation scores, and data.val=none gives none"
            )

    def kept(self, epoch: int) -> bool:
        """Tell whether the weights after ``epoch`` epochs are kept."""
        if isinstance(self.snapshots, int):
            return epoch % self.snapshots == 0
        return epoch in self.snapshots
