"""Training a model together with a reduction method.

The method brings its own losses and their weights; the task adds the classification loss and what
compares with a dense teacher: "kl" on logits and "token" on the final tokens that were kept.
Gated methods run masked here, all others as they are deployed, with real token counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.backbones import backbone_for
from foveate.convert import save
from foveate.core import Outcome, ReducedViT, dense
from foveate.registry import suggest
from foveate.train.draws import Draws
from foveate.train.losses import distillation, token_distillation
from foveate.train.task import LOGITS, Task

__all__ = ["ReduceTask", "own_weights"]

_COMPARED = ("kl", "token")  # losses that need a teacher


def own_weights(model: ReducedViT) -> dict[str, float]:
    """The losses that a method is trained with and their weights, as its paper has them.

    In a chain the losses that parts compute themselves carry the part's name.
    """
    several = len(model.reducer.members) > 1
    found: dict[str, float] = {}
    for part in model.reducer.members:
        weights = dict(part.loss_weights)
        if "aux" in weights and not getattr(part, "aux", False):
            continue  # the auxiliary head is an option, and the class loss stands alone without it
        shared = ("class", "aux", *_COMPARED)
        found |= {
            f"{part.name}.{name}" if several and name not in shared else name: weight
            for name, weight in weights.items()
        }
    return found


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
        self.token_loss = token_loss
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
        """Losses "class", the method's own, and "kl" and "token" where they have a weight."""
        outcome = self.model.run(images)
        losses = {"class": F.cross_entropy(outcome.logits.float(), targets)}
        losses |= self.model.reducer.losses(outcome.notes)
        aux = self._auxiliary(outcome)
        if aux is not None:
            losses["aux"] = F.cross_entropy(aux.float(), targets)
        if self.teacher is not None:
            losses |= self._compared(images, outcome)
        losses[LOGITS] = outcome.logits
        return losses

    def _auxiliary(self, outcome: Outcome) -> Tensor | None:
        """Logits of a method's auxiliary head."""
        for part in self.model.reducer.members:
            logits = part.noted(outcome.notes, "aux_logits")
            if logits is not None:
                return logits
        return None

    def _compared(self, images: Tensor, outcome: Outcome) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = self._dense[0].run(images)
        losses = {}
        if self.weights["kl"]:
            losses["kl"] = distillation(outcome.logits, teacher.logits)
        if self.weights.get("token"):
            state = outcome.state
            assert state.alive is not None  # gated methods train masked
            patches = slice(state.prefix, state.prefix + state.patches)  # package tokens follow
            losses["token"] = token_distillation(
                state.tokens()[:, patches],
                teacher.state.tokens()[:, teacher.state.prefix :],
                state.alive[:, patches],
                self.token_loss,
            )
        return losses

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
