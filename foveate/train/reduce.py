"""Training a model together with a reduction method.

The method computes its own losses, those that compare with a dense teacher too ("kl" on logits,
"token" on the final tokens that were kept); the task adds the classification loss. Gated methods
run masked here, all others as they are deployed, with real token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backbones import backbone_for
from foveate.convert import save
from foveate.core import GatedReducer, Outcome, ReducedViT, dense
from foveate.core.chain import chained_name
from foveate.registry import make, suggest
from foveate.train.draws import Draws
from foveate.train.images import ClassificationTask, ImageTask
from foveate.train.recipe import Data, Mix

__all__ = ["MethodTask", "ReduceTask", "chosen_weights", "own_weights"]

_COMPARED = ("kl", "token")  # losses that need a teacher


def own_weights(model: ReducedViT) -> dict[str, float]:
    """Return the losses of a method and their weights, as in its paper."""
    members = model.reducer.members
    return {
        chained_name(part, name) if len(members) > 1 else name: weight
        for part in members
        for name, weight in make(part.name, part.config()).loss_weights.items()
        if name in part.loss_weights  # a model may have nothing that a loss would train
    }


def chosen_weights(
    given: Mapping[str, float] | None, usual: Mapping[str, float], method: str
) -> dict[str, float]:
    """Return the weights of losses, changed as given; unknown names are refused."""
    given = given or {}
    for name in given:
        if name not in usual:
            raise ValueError(suggest(f"loss of {method}", name, usual))
    return {**usual, **given}


class MethodTask(ImageTask):
    """The part of training a model with a method that does not depend on the labels."""

    model: ReducedViT
    _run: Callable[..., Outcome] | None = None  # compiled

    def run(self, images: Tensor, *, track: bool = False) -> Outcome:
        """Run a training step's pass, compiled or not."""
        return (self._run or self.model.run)(images, track=track)

    def set_progress(self, progress: float, model: nn.Module) -> None:
        """Lower the method's rate and change its stages as the run goes on."""
        assert isinstance(model, ReducedViT)
        model.set_progress(progress)

    @property
    def backbone(self) -> nn.Module:
        """Return the ViT; evaluation mode reaches it alone, since gates must go on sampling."""
        return self.model.vit

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the driven pass, which steps call instead of the model."""
        self._run = torch.compile(self.model.run, *args, **kwargs)

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write backbone and method, for ``foveate.load``."""
        assert isinstance(model, ReducedViT)
        path = folder / "model"
        save(model, path, everything=True)
        return path


class ReduceTask(MethodTask, ClassificationTask):
    """Classification, the method's own losses, and distances from a dense teacher.

    If ``needs_teacher`` is true, ``learn_from`` gives the teacher afterwards; the weights decide
    which losses are computed.
    """

    def __init__(
        self,
        model: ReducedViT,
        classes: int,
        data: Data | None = None,
        mix: Mix | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        token_loss: str = "mse",
    ) -> None:
        usual = {"class": 1.0, "kl": 0.0, **own_weights(model)}
        weights = chosen_weights(weights, usual, model.reducer.name)
        super().__init__(model, classes, data, mix, weights=weights)
        for part in model.reducer.members:
            part.loss_weights |= {name: weights[name] for name in _COMPARED if name in weights}
            if isinstance(part, GatedReducer):
                part.token_loss = token_loss

    @property
    def needs_teacher(self) -> bool:
        """Tell whether a loss compares with a dense model."""
        return any(self.weights.get(name) for name in _COMPARED)

    def learn_from(self, teacher: nn.Module) -> None:
        """Compare with a dense model from now on."""
        mine, its = self.model.backbone.spec, backbone_for(teacher).spec
        token = bool(self.weights.get("token"))
        for what in ("classes", *(("width", "patch") if token else ())):
            if getattr(mine, what) != getattr(its, what):
                raise ValueError(
                    f"the teacher has {what} {getattr(its, what)}, the student "
                    f"{getattr(mine, what)}: they do not fit"
                )
        self.teacher = dense(backbone_for(teacher)).eval().requires_grad_(False)

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Compute the loss "class" and the method's own ones, which may compare with a teacher."""
        images, targets = self.mixed(batch)
        outcome, teacher = self.run(images), None
        if self.needs_teacher:
            if self.teacher is None:
                names = " and ".join(name for name in _COMPARED if self.weights.get(name))
                raise ValueError(f"the losses {names} need a teacher")
            with torch.no_grad():
                teacher = self.teacher.run(images)  # type: ignore[operator]
        return {
            "class": self.classified(outcome.logits, targets),
            **self.model.reducer.losses(outcome, targets, teacher),
        }
