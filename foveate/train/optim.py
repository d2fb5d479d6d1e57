"""Parameter groups and the learning rate of every update.

timm makes the optimisers, assigns layers to groups and knows the cosine; here it is decided which
parameter belongs where. A rate is a function of the update's number alone, so a resumed run needs
no state for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from foveate.core import ReducedViT
from foveate.train.recipe import Optim
from foveate.train.task import Task

__all__ = ["Rates", "fix_parameters", "make_optimiser", "parameter_groups", "scaled", "updates_of"]


# Positions and prefix tokens. timm's models name theirs, those of transformers do not.
_UNDECAYED = (
    *("pos_embed", "position_embeddings", "position_embedding.weight", "class_embedding"),
    *("cls_token", "dist_token", "distillation_token", "reg_token", "register_tokens"),
    "mask_token",
)


def scaled(optim: Optim, images: int) -> tuple[float, float, float]:
    """Return peak, last and first learning rate for so many images an update."""
    factor = images / optim.lr_batch if optim.lr_batch else 1.0
    return optim.lr * factor, optim.min_lr * factor, optim.warmup_lr * factor


def parameter_groups(task: Task, optim: Optim) -> list[dict[str, Any]]:
    """Make parameter groups with their weight decay and their factor of the rate (``lr_scale``).

    The task's backbone trains at ``backbone_scale``, with ``layer_decay`` and after
    ``frozen_epochs``; everything else, such as a head beside it, at the full rate from the start,
    and the method's own parameters at ``method_scale``. Groups say which they are in ``new``.
    """
    backbone: Any = task.backbone
    if optim.layer_decay != 1 and not hasattr(backbone, "group_matcher"):
        raise ValueError(
            f"optim.layer_decay={optim.layer_decay} needs a model of timm, which says which layer "
            f"a parameter is in; {type(backbone).__name__} does not: use 1"
        )
    plain = _exempt(backbone)
    plain |= {name for name, _ in backbone.named_parameters() if name.endswith(_UNDECAYED)}
    groups: list[dict[str, Any]] = []
    if optim.layer_decay != 1:
        for group in param_groups_layer_decay(
            backbone, optim.weight_decay, no_weight_decay_list=plain, layer_decay=optim.layer_decay
        ):
            group["params"] = [p for p in group["params"] if p.requires_grad]
            group["lr_scale"] *= optim.backbone_scale
            groups.append({**group, "new": False})
    else:
        named = dict(backbone.named_parameters())
        groups += _by_decay(named, plain, optim.weight_decay, optim.backbone_scale, new=False)
    inside = {id(p) for p in backbone.parameters()}
    added = {name: p for name, p in task.model.named_parameters() if id(p) not in inside}
    # A ReducedViT names parameters of its ViT alone, which have their groups already.
    exempt = set() if isinstance(task.model, ReducedViT) else _exempt(task.model)
    method = getattr(task.model, "reducer", None)
    gates = {id(p) for p in method.parameters()} if isinstance(method, nn.Module) else set()
    for own, scale in ((False, 1.0), (True, optim.method_scale)):
        chosen = {name: p for name, p in added.items() if (id(p) in gates) == own}
        groups += _by_decay(chosen, exempt, optim.weight_decay, scale, new=True)
    groups = [
        {k: v for k, v in group.items() if k != "param_names"}
        for group in groups
        if group["params"]
    ]
    if not groups:
        raise ValueError("optim.fixed leaves nothing to train")
    return groups


def make_optimiser(task: Task, optim: Optim, peak: float) -> torch.optim.Optimizer:
    """Make the optimiser by timm's name for it."""
    options: dict[str, Any] = {} if optim.betas is None else {"betas": tuple(optim.betas)}
    groups = parameter_groups(task, optim)
    try:
        return create_optimizer_v2(
            groups, optim.name, lr=peak, weight_decay=optim.weight_decay, **options
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"optim.name={optim.name}: {error}") from error


class Rates:
    """Sets the learning rate of every group for an update.

    Linear from ``warmup_lr`` over the warm-up, then half a cosine down to ``min_lr`` at the end of
    the run, or a tenth at each milestone. Groups that are not new wait out ``frozen`` updates at
    rate zero: they keep their gradients, which data-parallel training counts on.

    Args:
        optimiser: with groups from ``parameter_groups``.
        rates: peak, last and first rate.
        updates: of the whole run.
        warmup: updates of the warm-up.
        frozen: updates during which only new parameters move.
        milestones: updates at which the rate falls to a tenth, instead of the cosine.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        rates: tuple[float, float, float],
        *,
        updates: int,
        warmup: int = 0,
        frozen: int = 0,
        milestones: Sequence[int] = (),
    ) -> None:
        peak, last, first = rates
        self.optimiser, self.frozen = optimiser, frozen
        warmup = min(warmup, updates)
        self._schedule: Scheduler
        if milestones:
            # timm's default counts milestones from the end of the warm-up, and its step is one
            # update before a milestone.
            self._schedule = MultiStepLRScheduler(
                optimiser,
                decay_t=[milestone + 1 for milestone in sorted(milestones)],
                decay_rate=0.1,
                warmup_t=warmup,
                warmup_lr_init=first,
                warmup_prefix=False,
                t_in_epochs=False,
            )
            return
        # warmup_prefix: the cosine begins where the warm-up ends. timm's default begins it at 0,
        # and jumps down at the end of the warm-up.
        self._schedule = CosineLRScheduler(
            optimiser,
            t_initial=max(1, updates - warmup),
            lr_min=last,
            warmup_t=warmup,
            warmup_lr_init=first,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set(self, update: int) -> float:
        """Set the rates for an update, counted from 0; gives the full one."""
        self._schedule.step_update(update)
        full = 0.0
        for group in self.optimiser.param_groups:
            full = max(full, group["lr"] / group["lr_scale"] if group["lr_scale"] else 0.0)
            if update < self.frozen and not group["new"]:
                group["lr"] = 0.0
        return full


def updates_of(epochs: float, batches: int, accumulate: int) -> int:
    """Count the updates in so many epochs; the last batches make one even if they are few."""
    return round(epochs * math.ceil(batches / accumulate))


def fix_parameters(task: Task, optim: Optim) -> None:
    """Take parameters out of training by the last part of their name.

    It comes before everything else: processes agree once on which parameters have gradients.
    """
    named = dict(task.model.named_parameters())
    for wanted in optim.fixed:
        found = [p for name, p in named.items() if name == wanted or name.endswith("." + wanted)]
        if not found:
            raise ValueError(f"optim.fixed names {wanted}, which no parameter of the model is")
        for parameter in found:
            parameter.requires_grad_(False)


def _exempt(model: Any) -> set[str]:
    """Return the names of the parameters that a model wants left out of weight decay."""
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def _by_decay(
    named: dict[str, nn.Parameter], plain: set[str], weight_decay: float, scale: float, *, new: bool
) -> list[dict[str, Any]]:
    """Make a group with weight decay and one without: biases, norms, positions, tokens."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named.items():
        if parameter.requires_grad:
            without = parameter.ndim <= 1 or name in plain or name.endswith(".bias")
            (rest if without else decayed).append(parameter)
    return [
        {"params": some, "weight_decay": decay, "lr_scale": scale, "new": new}
        for some, decay in ((decayed, weight_decay), (rest, 0.0))
    ]
