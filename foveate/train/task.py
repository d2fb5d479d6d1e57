"""What a training job computes on a batch: a module that gives named losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from foveate.train.scores import Accuracy, Scores

__all__ = ["LOGITS", "Task", "freeze", "total"]

LOGITS = "logits"


class Task(nn.Module):
    """Base of the jobs.

    ``forward(images, targets, draws)`` gives a dictionary of named losses, un-weighted scalars,
    and, where there are any, the logits under ``"logits"``, from which the progress bar takes the
    accuracy.

    Attributes:
        model: what is trained, evaluated and exported.
        weights: factor of each loss in the sum; 1 for those that are not named.
        teacher: a frozen model to compare with, or None. It is no part of the state: checkpoints
            do not carry it, since every run can open it again.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, float] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = dict(weights or {})
        # In a list, so that it is not registered as a submodule.
        self._teacher = [] if teacher is None else [freeze(teacher)]

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0] if self._teacher else None

    def place(self, device: torch.device) -> None:
        """Bring along what is not registered."""
        for model in self._teacher:
            model.to(device)

    def new_parameters(self) -> set[int]:
        """Ids of parameters that a method added: they train at the full rate from the start."""
        return set()

    def advance(self, progress: float) -> None:
        """How much of the run, 0 to 1, is done before the next step."""

    def scores(self, classes: int) -> Scores:
        """What counts in evaluation."""
        return Accuracy(classes)

    def settle(self, eval_mode: bool) -> None:
        """Set training mode; with ``eval_mode`` dropout and stochastic depth stay off."""
        self.train()
        if eval_mode:
            self.model.eval()

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write the trained model for use; gives the path."""
        raise NotImplementedError


def freeze(model: nn.Module) -> nn.Module:
    """A model in eval mode that no longer learns."""
    return model.eval().requires_grad_(False)


def total(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum; a weight of zero leaves a loss out, so that its trouble does not spread."""
    terms = [
        weights.get(name, 1.0) * value for name, value in losses.items() if weights.get(name, 1.0)
    ]
    return torch.stack(terms).sum()
