"""Training a model together with a reduction method.

The method computes its own losses, those that compare with a dense teacher too ("kl" on logits,
"token" on the final tokens that were kept); the task adds the classification loss. Gated methods
run masked here, all others as they are deployed, with real token counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.backbones import backbone_for
from foveate.convert import save
from foveate.core import GatedReducer, ReducedViT, dense
from foveate.core.chain import chained_name
from foveate.registry import make, suggest
from foveate.train.draws import Draws
from foveate.train.task import LOGITS, Task

__all__ = ["ReduceTask", "own_weights"]

_COMPARED = ("kl", "token")  # losses that need a teacher


def own_weights(model: ReducedViT) -> dict[str, float]:
    """Return the losses that a method is trained with and their weights, as its paper has them."""
    members = model.reducer.members
    return {
        chained_name(part, name) if len(members) > 1 else name: weight
        for part in members
        for name, weight in make(part.name, part.config()).loss_weights.items()
        if name in part.loss_weights  # a model may have nothing that a loss would train
    }


class ReduceTask(Task):
    """Classification, the method's own losses, and distances from a dense teacher."""

    model: ReducedViT

    def __init__(
        self,
        model: ReducedViT,
        teacher: nn.Module | None = None,
        weights: Mapping[str, float] | None = None,
        token_loss: str = "mse",
    ) -> None:
        own = own_weights(model)
        given = dict(weights or {})
        legal = {"class": 1.0, "kl": 0.0, **own}
        for name in given:
            if name not in legal:
                raise ValueError(suggest(f"loss of {model.reducer.name}", name, legal))
        weights = {**legal, **given}
        needed = [name for name in _COMPARED if weights.get(name)]
        if needed and teacher is None:
            raise ValueError(f"the losses {' and '.join(needed)} need a teacher")
        super().__init__(model, weights, teacher if needed else None)
        for part in model.reducer.members:
            part.loss_weights |= {name: weights[name] for name in _COMPARED if name in weights}
            if isinstance(part, GatedReducer):
                part.token_loss = token_loss
        if self.teacher is not None:
            self._dense = [dense(backbone_for(self.teacher))]
            mine, its = model.backbone.spec, self._dense[0].backbone.spec
            for what in ("classes", *(("width", "patch") if weights.get("token") else ())):
                if getattr(mine, what) != getattr(its, what):
                    raise ValueError(
                        f"the teacher has {what} {getattr(its, what)}, the student "
                        f"{getattr(mine, what)}: they do not fit"
                    )

    def forward(self, images: Tensor, targets: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Compute the loss "class" and the method's own ones, which may compare with a teacher."""
        outcome, teacher = self.model.run(images), None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self._dense[0].run(images)
        return {
            "class": F.cross_entropy(outcome.logits.float(), targets),
            **self.model.reducer.losses(outcome, targets, teacher),
            LOGITS: outcome.logits,
        }

    def new_parameters(self) -> set[int]:
        """The method's parameters."""
        return {id(p) for p in self.model.reducer.parameters()}

    def settle(self, eval_mode: bool) -> None:
        """Only the backbone goes to eval mode: gates must go on sampling."""
        self.train()
        if eval_mode:
            self.model.vit.eval()

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write backbone and method, for ``foveate.load``."""
        assert isinstance(model, ReducedViT)
        path = folder / "model"
        save(model, path, everything=True)
        return path
