"""Methods with a teacher: a slow copy of the model, which sees whole images and gets no gradient.

The task holds and saves the copy; the optimiser and the exported file have only the student.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.data import Transform
from foveate.mim.masks import Mask
from foveate.mim.method import METHODS, MaskedImageModel, Prediction

__all__ = [
    *("SecondView", "TaughtModel", "check_keeps_teacher", "check_momentum", "follow"),
    "make_teacher",
]


class TaughtModel(MaskedImageModel):
    """Base of the methods whose target comes from a slow copy of the model itself.

    Attributes:
        teacher_trains: the copy is in training mode while the student is, so that its batch norms
            use the statistics of the batch.
    """

    teacher_trains: ClassVar[bool] = False

    def forward(
        self, images: Tensor, mask: Mask, *, target: Tensor | None = None, states: bool = False
    ) -> Prediction:
        """Predict the hidden patches of normalised images and compare.

        Args:
            images: ``[B, C, H, W]``.
            mask: for as many images and patches.
            target: what ``target`` of the teacher gave for whole images; None takes this model's
                own, which is how a model without its teacher is looked at.
            states: collect the tokens of every layer.
        """
        raise NotImplementedError

    def target(self, images: Tensor) -> Tensor:
        """Return a teacher's targets for whole images ``[B, N, values]``, without gradient."""
        raise NotImplementedError

    def momentum_at(self, progress: float, epochs: int) -> float:
        """Return the share of itself that the teacher keeps in an update.

        Args:
            progress: how much of the run is done, 0 to 1.
            epochs: of the whole run.
        """
        raise NotImplementedError

    def weights_at(self, progress: float, epochs: int) -> dict[str, float]:
        """Return factors of losses that change with the run; those that are not named have 1."""
        return {}

    def view(self) -> Callable[[Tensor], Tensor] | None:
        """Return the transform of a training image ``[C, H, W]`` uint8 for the teacher only."""
        return None

    def slow_copy(self) -> TaughtModel:
        """Return a copy with all that ``target`` needs."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class SecondView:
    """Prepare a sample, and add the teacher's view of its image under "view".

    Both have the same crop: patches of one are patches of the other.
    """

    first: Transform
    second: Callable[[Tensor], Tensor]

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Draw from the global generators, which a loader seeds for each image."""
        found = self.first(sample)
        image = found["image"]
        if image.dtype != torch.uint8:
            raise ValueError(
                f"holds {image.dtype}: the teacher's view is made of images of uint8, before they "
                "are normalised"
            )
        return {**found, "view": self.second(image)}


def make_teacher(model: TaughtModel, given: TaughtModel | None = None) -> TaughtModel:
    """Return a copy of the student, or of a given teacher if it fits."""
    wanted = model.slow_copy()
    if given is None:
        return wanted
    if type(given) is not type(model):
        raise ValueError(
            f"the teacher of {model.name} must be a {type(model).__name__}, got "
            f"{type(given).__name__}"
        )
    teacher = given.slow_copy()  # the given one may be the student itself
    mine, its = (_facts(one) for one in (wanted, teacher))
    for name in sorted(mine.keys() | its.keys()):
        if mine.get(name) != its.get(name):
            raise ValueError(
                f"the teacher does not fit its student: {name} is {its.get(name, 'missing')} in "
                f"the teacher and {mine.get(name, 'missing')} in the student"
            )
    return teacher


def _facts(model: TaughtModel) -> dict[str, Any]:
    """Return what a student and its teacher have in common."""
    found: dict[str, Any] = {"the number of heads": model.backbone.spec.heads}
    for name, value in model.state_dict().items():
        kind = str(value.dtype).removeprefix("torch.")
        found[name] = [*value.shape] if kind == "float32" else f"{[*value.shape]} in {kind}"
    return found


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move a teacher's parameters towards its student's; buffers stay the teacher's own."""
    learnt = dict(student.named_parameters())
    mine = dict(teacher.named_parameters())
    torch._foreach_lerp_(list(mine.values()), [_whole(learnt[name]) for name in mine], 1 - momentum)


def _whole(parameter: Tensor) -> Tensor:
    """Return a whole parameter; if its parts are on several processes, all must call this."""
    full = getattr(parameter, "full_tensor", None)
    return parameter if full is None else full()


def check_keeps_teacher(run: str, method: Any) -> None:
    """Refuse to start from the teacher of a run that keeps none.

    Args:
        run: its name, for the message.
        method: method of its recipe; None if it is no pre-training.
    """
    keep = [name for name, cls in METHODS.items() if issubclass(cls, TaughtModel)]
    if method not in keep:
        raise ValueError(
            f"{run} keeps no teacher to start from; pre-training by {' or '.join(keep)} does"
        )


def check_momentum(*given: Any) -> None:
    """Refuse a momentum with which a teacher never follows, or diverges."""
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {value}")
