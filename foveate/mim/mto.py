"""Masked token optimisation: three losses on the tokens of any method of masked image modelling.

Choi et al., "Emerging Property of Masked Token for Effective Pre-training"; docs/pretraining.md
says what the paper leaves open and what is chosen here. "spa" keeps visible tokens from giving
their attention to hidden ones at the start, "e" makes hidden tokens look at all visible ones alike
at the start, and "r" lets heterogeneity sink from layer to layer. All three need nothing but the
tokens: no attention maps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.schedule import check_choice
from foveate.mim.heterogeneity import (
    SIMILARITIES,
    Similarity,
    entropy,
    heterogeneity,
    recomputed,
)
from foveate.mim.masks import Mask
from foveate.mim.method import States

__all__ = ["PRESETS", "Mto", "mto_losses"]

_log = logging.getLogger(__name__)

# "default" is what makes the three comparable and alive at the start; "paper" what is printed.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "spa": 0.1,
        "e": 0.1,
        "r": 0.1,
        "ramp": 0.05,
        "similarity": "cosine",
        "temperature": 0.1,
        "initial": "pre_pos",
        "normalise": True,
        "reduction": "mean",
        "include_self": False,
        "direction": "decreasing",
        "eps": 1e-3,
    },
    "paper": {
        "spa": 1.0,
        "e": 1.0,
        "r": 1.0,
        "ramp": 0.0,
        "similarity": "raw",
        "temperature": 1.0,
        "initial": "pre_pos",
        "normalise": False,
        "reduction": "sum",
        "include_self": True,
        "direction": "as_printed",
        "eps": 1e-6,
    },
}


@dataclass(kw_only=True)
class Mto:
    """Masked token optimisation, off unless a setting of it is given; the preset gives the others.

    Attributes:
        preset: "default", or "paper" for the formulas as they are printed.
        spa: weight of the loss that separates visible from hidden tokens.
        e: weight of the loss that raises the first heterogeneity.
        r: weight of the loss that ranks heterogeneity from layer to layer.
        ramp: share of the run over which the weights grow from 0.
        similarity: how tokens are compared: "cosine", "layernorm", "scaled" or "raw".
        temperature: number that divides cosines before the softmax; the lower it is, the more
            the most similar tokens count.
        initial: tokens that count as layer 0: "pre_pos", before positions are added, or "post_pos".
        normalise: divide entropies by their largest possible value.
        reduction: "mean" or "sum" over visible tokens ("spa") and over layers ("r").
        include_self: let a visible token's similarity to itself count in "spa".
        direction: "decreasing" makes heterogeneity fall with depth, as the paper's text and
            figures say; "as_printed" is its formula, which does the opposite.
        eps: small number that is added to the heterogeneity that the loss "e" divides by.
        form: what the loss "spa" measures: the "entropy" of a visible token's attention, or the
            "mass" of it that stays on visible tokens, which is more direct and not in the paper.
        margin: amount by which heterogeneity has to fall from layer to layer.
        layers: layers to compare: a number N takes every Nth, from before the first block on; a
            list takes those in it.
        detach_visible: let the gradient of heterogeneity reach only hidden tokens.
        detach_prev: let the gradient of the ranking reach only the later layer of each pair.
    """

    preset: str = "default"
    spa: float | None = None
    e: float | None = None
    r: float | None = None
    ramp: float | None = None
    similarity: str | None = None
    temperature: float | None = None
    initial: str | None = None
    normalise: bool | None = None
    reduction: str | None = None
    include_self: bool | None = None
    direction: str | None = None
    eps: float | None = None
    form: str = "entropy"
    margin: float = 0.0
    layers: int | tuple[int, ...] = 1
    detach_visible: bool = False
    detach_prev: bool = False

    def __post_init__(self) -> None:
        check_choice("mto.preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_choice("mto.similarity", self.similarity, SIMILARITIES)
        check_choice("mto.initial", self.initial, ("pre_pos", "post_pos"))
        check_choice("mto.reduction", self.reduction, ("mean", "sum"))
        check_choice("mto.direction", self.direction, ("decreasing", "as_printed"))
        check_choice("mto.form", self.form, ("entropy", "mass"))
        for name in ("spa", "e", "r", "margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"mto.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("temperature", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"mto.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.ramp <= 1:  # type: ignore[operator]
            raise ValueError(f"mto.ramp is a share of the run and lies in [0, 1], got {self.ramp}")
        if isinstance(self.layers, list):
            self.layers = tuple(self.layers)
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"mto.layers must be at least 1, got {self.layers}")
        if isinstance(self.layers, tuple) and len(set(self.layers)) < 2:
            raise ValueError(f"mto.layers must name at least 2 to rank, got {list(self.layers)}")

    @property
    def weights(self) -> dict[str, float]:
        """Return the losses' weights by the names that ``mto_losses`` gives them."""
        return {f"mto_{name}": getattr(self, name) for name in ("spa", "e", "r")}

    @property
    def active(self) -> bool:
        """Tell whether any loss has a weight."""
        return any(self.weights.values())

    def weights_at(self, progress: float) -> dict[str, float]:
        """Return the weights at a progress of the run from 0 to 1."""
        assert self.ramp is not None
        grown = min(1.0, progress / self.ramp) if self.ramp else 1.0
        return {name: grown * weight for name, weight in self.weights.items()}

    def chosen(self, depth: int) -> list[int]:
        """Return the layers whose heterogeneity is compared; 0 is before the first block."""
        if isinstance(self.layers, int):
            return [0, *range(self.layers, depth + 1, self.layers)]
        wrong = [layer for layer in self.layers if not 0 <= layer <= depth]
        if wrong:
            raise ValueError(f"mto.layers must lie in 0..{depth}, got {wrong[0]}")
        return sorted(set(self.layers))

    def check_depth(self, depth: int) -> None:
        """Refuse a depth without layers to rank, and warn if there is only a single pair."""
        if not self.r:
            return
        chosen = self.chosen(depth)
        if len(chosen) < 2:
            raise ValueError(
                f"masked token optimisation ranks layers, and {len(chosen) - (0 in chosen)} of a "
                f"network of depth {depth} is too few: lower mto.layers, or set mto.r=0"
            )
        if depth < 2:
            _log.warning(
                "masked token optimisation ranks layers, and a network of %d block has a single "
                "pair of them, with which the paper's models were worst: give it 2 or more, or "
                "set mto.r=0",
                depth,
            )


def mto_losses(states: Sequence[States], mask: Mask, choices: Mto) -> dict[str, Tensor]:
    """Compute the losses that have a weight, means over networks: "mto_spa", "mto_e", "mto_r".

    Of every layer one map of similarities is kept for the backward pass, and the rest recomputed.

    Args:
        states: tokens of each network that has hidden and visible tokens.
        mask: the hidden patches.
        choices: the options of MTO.
    """
    found: dict[str, list[Tensor]] = {
        name: [] for name, weight in choices.weights.items() if weight
    }
    for network in states:
        for name, loss in _network_losses(network, mask, choices).items():
            found[name].append(loss)
    return {name: torch.stack(losses).mean() for name, losses in found.items()}


def _network_losses(network: States, mask: Mask, choices: Mto) -> dict[str, Tensor]:
    first = network.initial if choices.initial == "pre_pos" else network.tokens[0]
    kind = Similarity(str(choices.similarity), float(choices.temperature or 1.0))
    losses: dict[str, Tensor] = {}
    if choices.spa:
        losses["mto_spa"] = _separation(first, mask, kind, choices)
    if not (choices.e or choices.r):
        return losses

    def of(*layers: Tensor) -> Tensor:
        """Return the heterogeneity of each layer."""
        values = heterogeneity(
            layers,
            mask,
            kind,
            normalise=bool(choices.normalise),
            detach_visible=choices.detach_visible,
        )
        return _over_images(values, mask)

    start = of(first)
    if choices.e:
        losses["mto_e"] = 1 / (start[0] + float(choices.eps or 0))
    if choices.r:
        layers = choices.chosen(len(network.tokens) - 1)
        later = [network.tokens[layer] for layer in layers if layer]
        many = _at_once(first, len(later))
        parts = [of(*later[i : i + many]) for i in range(0, len(later), many)]
        levels = torch.cat([start, *parts] if 0 in layers else parts)
        before_it, after_it = levels[:-1], levels[1:]
        before_it = before_it.detach() if choices.detach_prev else before_it
        rise = after_it - before_it
        rise = rise if choices.direction == "decreasing" else -rise
        each = F.softplus(rise + choices.margin)
        losses["mto_r"] = each.mean() if choices.reduction == "mean" else each.sum()
    return losses


def _separation(tokens: Tensor, mask: Mask, kind: Similarity, choices: Mto) -> Tensor:
    """Return the entropy of visible tokens' rows, or minus the log of their visible share."""
    count = tokens.shape[1]
    if mask.visible is None:
        own = torch.arange(count, device=tokens.device).expand(len(tokens), -1)
        shown = ~mask.hidden
    else:
        own, shown = mask.visible, torch.ones_like(mask.visible, dtype=torch.bool)

    def of(logits: Tensor) -> Tensor:
        if not choices.include_self:
            logits = logits.scatter(-1, own[..., None], float("-inf"))
        if choices.form == "mass":
            # A token that sees no other visible one has no mass to keep.
            alone = (~mask.hidden).sum(1)[:, None, None] < 2
            visible = logits.masked_fill(mask.hidden[:, None, :] & ~alone, float("-inf"))
            each = logits.logsumexp(-1) - visible.logsumexp(-1)
        else:
            each = entropy(logits)
            if choices.normalise:
                each = each / math.log(count if choices.include_self else count - 1)
        total = (each * shown).sum(1)
        if choices.reduction == "mean":
            total = total / shown.sum(1).clamp_min(1)
        return total.mean()

    with torch.autocast(tokens.device.type, enabled=False):
        return recomputed(of, kind(tokens, chosen=mask.visible).mT)


def _at_once(tokens: Tensor, layers: int) -> int:
    """Return how many layers go together: few operations suit a GPU, little memory a CPU."""
    return layers if tokens.is_cuda else 1


def _over_images(values: Tensor, mask: Mask) -> Tensor:
    """Return the means ``[layers]`` over images that have something to compare."""
    if mask.visible is not None:
        return values.mean(1)
    count = (~mask.hidden).sum(1)
    fit = ((count > 1) & (count < mask.hidden.shape[1])).float()
    return (values * fit).sum(1) / fit.sum().clamp_min(1)
