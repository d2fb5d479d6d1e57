"""The task of a training job: everything that the engine does not know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from foveate.core import Trace
from foveate.data import Transform, stacked
from foveate.train.draws import Draws

__all__ = ["Task", "total"]


class Task(nn.Module):
    """Base of the jobs.

    The engine knows loops, devices, precision, checkpoints and logs. A task defines the rest:
    transforms, batches, losses, metrics, and what is exported. Its whole state is saved and
    resumed, including that of a teacher.

    Attributes:
        model: the model that is trained, evaluated and exported.
        teacher: a model to compare with; it stays in evaluation mode and gets no gradient.
        weights: factor of each loss in the sum; 1 for those that are not named.
        notes: numbers beside the losses, which ``training_step`` leaves here to be logged.
        score: the metric that chooses the best weights.
        higher_is_better: of that metric.
    """

    score: str = "loss"
    higher_is_better: bool = False
    model: nn.Module
    teacher: nn.Module | None

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, float] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = dict(weights or {})
        self.notes: dict[str, Tensor] = {}
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    # Data ---------------------------------------------------------------------------------------

    def transforms(self) -> tuple[Transform, Transform]:
        """Return how samples are prepared, in training and in evaluation."""
        raise NotImplementedError

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of samples: the same keys, tensors stacked, numbers in one tensor."""
        return stacked(samples)

    # Steps --------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Compute the losses of a batch, un-weighted scalars by name.

        Args:
            batch: what ``collate`` made, on the device.
            draws: random numbers of the step that do not depend on the number of processes.
        """
        raise NotImplementedError

    def set_progress(self, progress: float, model: nn.Module) -> None:
        """Adapt to the progress of the run, 0 to 1, before each step and each evaluation.

        ``model`` is the task's own, or its running mean if that is evaluated.
        """

    def after_update(self) -> None:
        """Do what follows an update of the weights, such as moving a teacher."""

    # Evaluation -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of an evaluation by name; each evaluated model gets a set of its own.

        ``MeanMetric(nan_strategy=float("nan"))`` gives NaN where one value is; the default of
        torchmetrics is the mean of the others.
        """
        raise NotImplementedError

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        """Add a batch to the metrics; ``number`` is its index within this process."""
        raise NotImplementedError

    def trace(self, model: nn.Module, batch: Mapping[str, Any]) -> Trace | None:
        """Record what a method does to the tokens of a batch; None without a method."""
        return None

    # What learns, and what comes of it ------------------------------------------------------------

    @property
    def backbone(self) -> nn.Module:
        """Return the part to which ``layer_decay``, ``backbone_scale`` and ``frozen_epochs`` apply.

        All other parameters of the model train at the full rate from the start.
        """
        return self.model

    def units(self) -> list[nn.Module]:
        """Return the parts that are sharded and gathered one by one: the blocks."""
        return []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model, in which a step spends most of its time."""
        self.model.compile(*args, **kwargs)

    def train(self, mode: bool = True) -> Task:
        """Set the mode; a teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write the trained model for use, and return its path."""
        raise NotImplementedError


def total(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum; a weight of zero leaves a loss out, NaN included."""
    terms = [
        weights.get(name, 1.0) * value for name, value in losses.items() if weights.get(name, 1.0)
    ]
    if not terms:
        raise ValueError(
            f"the losses {', '.join(losses)} all have the weight 0, so that nothing is learnt: "
            "give one of them another"
        )
    return torch.stack(terms).sum()
