"""ATM: merge every pair of tokens that is more similar than the block's threshold.

Paper: Lee and Choi, "Lossless Token Merging Even Without Fine-Tuning in Vision Transformers",
ECAI 2025, arXiv 2505.15160.

Matched: tokens split into two sets; each of the first finds its most similar partner in the second
by cosine similarity of head-averaged keys. All pairs above the threshold merge, by a mean weighted
with the patches each stands for, so every image has its own count. The threshold of block l = 1..L
is ``max(alpha - (exp(beta * (l - 1)) - 1), theta_min)``: it falls, because early merges hurt more.
Sets alternate as in ToMe; from the block ``split`` on, the smaller half of the tokens by size is
matched with the larger half, so that two large tokens never merge. Prefix tokens are never merged.

Training: none needed. No gradient flows through the matching.

The paper's constants alpha, beta, theta_min and ``split`` could not be found: the values here are
placeholders of ours. ``calibrate`` finds thresholds that meet a budget. Only the abstract and
reviews of the paper were at hand, and no code. The keys as metric, the place after attention, the
weighted mean, proportional attention and the choice of the smaller half as the one that merges
follow ToMe and are unverified. Deviations: the paper sets one count for each batch; here each image
has its own. Among tokens of one size, the halves alternate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import (
    AttentionReader,
    BackboneSpec,
    Match,
    MatchReducer,
    ReducedViT,
    Selection,
    TokenState,
)
from foveate.core.budget import parse_budget
from foveate.core.cost import cost, measured
from foveate.core.evaluation import evaluating
from foveate.ops import alternate_split, best_partner
from foveate.registry import register

__all__ = ["ATM", "calibrate"]

_STEPS = 20  # halvings of an interval of thresholds that is at most 4 long
_GOOD = 0.0025  # of the budget: the search stops this near to it
_TOLERANCE = 0.01
_AT_ONCE = 16  # images traced at a time


@register("atm")
@dataclass(eq=False, kw_only=True, repr=False)
class ATM(MatchReducer):
    """Merging by a similarity threshold.

    Attributes:
        threshold: pairs more similar than this merge: one number, or one for each block; None
            takes the falling rule.
        alpha: threshold of the rule in block 0.
        beta: how fast the rule falls with depth; 0 holds it constant.
        theta_min: lowest threshold of the rule.
        split: first block that matches small tokens with large ones; None is two thirds of the
            depth, and the depth itself means never.
    """

    threshold: float | tuple[float, ...] | None = None
    alpha: float = 0.9
    beta: float = 0.02
    theta_min: float = 0.7
    split: int | None = None

    paper: ClassVar[str] = "Lee and Choi, Lossless Token Merging (ATM), ECAI 2025"
    summary: ClassVar[str] = "merges all pairs of tokens above a similarity threshold"
    reads: ClassVar[frozenset[str]] = frozenset({"key_direction"})
    rate: ClassVar[str] = "threshold"
    identity: ClassVar[Mapping[str, Any] | None] = {"threshold": 1.0}

    def validate(self) -> None:
        """Refuse thresholds outside [-1, 1], and a beta that is negative or infinite."""
        super().validate()
        given = self.threshold if isinstance(self.threshold, Sequence) else (self.threshold,)
        named = [("threshold", t) for t in given if t is not None]
        for name, value in [*named, ("alpha", self.alpha), ("theta_min", self.theta_min)]:
            if not -1 <= value <= 1:
                raise ValueError(f"{name} must lie in [-1, 1], got {value!r}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be a finite number of at least 0, got {self.beta!r}")

    @property
    def fixed_count(self) -> bool:
        """Every image has its own count."""
        return False

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the blocks and the threshold of each of them."""
        super().build(spec)
        given = self.threshold
        if isinstance(given, Sequence) and len(given) != len(self.active_blocks):
            raise ValueError(
                f"threshold has {len(given)} entries for {len(self.active_blocks)} blocks"
            )
        if given is None:
            given = tuple(self._rule(block) for block in self.active_blocks)
        elif not isinstance(given, Sequence):
            given = (given,) * len(self.active_blocks)
        self.thresholds = dict(zip(self.active_blocks, given, strict=True))
        self.first_split = 2 * spec.depth // 3 if self.split is None else self.split
        if not 0 <= self.first_split <= spec.depth:
            raise ValueError(f"split must lie in 0..{spec.depth}, got {self.split!r}")

    def _rule(self, block: int) -> float:
        # Past an exponent of 2 the rule is below every cosine, and exp must not overflow.
        return max(self.alpha - math.expm1(min(self.beta * block, 2.0)), self.theta_min)

    def acts_between(self, block: int) -> bool:
        """Tell whether anything can merge here; keys are read only then."""
        return super().acts_between(block) and self.thresholds[block] < 1

    def match(self, block: int, state: TokenState, attention: AttentionReader) -> Match | None:
        """Pair up tokens and pick all pairs above the threshold."""
        if state.layout.longest - state.prefix < 2:
            return None
        keys = state.after_prefix(attention.key_direction())
        sources, targets = self._split(block, state)
        similarity = _of(keys, sources) @ _of(keys, targets).transpose(1, 2)
        value, partner = best_partner(similarity, targets.valid)
        merges, valid = value > self.thresholds[block], sources.valid
        best = Selection.where(merges if valid is None else merges & valid)
        stay = best.complement(merges.shape[1], valid).of(sources.index)
        into = stay.size + partner.gather(1, best.index)
        # Reorder images where nothing merges too: the next split must not depend on other images.
        return Match(stay.then(targets), best.of(sources.index), into)

    def _split(self, block: int, state: TokenState) -> tuple[Selection, Selection]:
        """Split the tokens of each image into those that may merge and those they merge into."""
        count, counts, present = state.layout.longest - state.prefix, state.counts, state.present()
        positions = torch.arange(count, device=state.x.device).expand(len(counts), -1)
        alternate = alternate_split(count, state.prefix % 2 == 0)
        if block < self.first_split:
            sources, targets = (
                Selection(positions[:, part], tuple(len(range(n)[part]) for n in counts))
                for part in alternate
            )
            return sources, targets
        # A stable sort of the alternating order splits tokens of equal size as before.
        order = torch.cat([positions[:, part] for part in alternate], 1)
        size = state.after_prefix(state.merge_weight())
        if present is not None:
            size = size.masked_fill(~present, math.inf)
        order = order.gather(1, size.gather(1, order).sort(dim=1, stable=True).indices)
        small = Selection(order[:, : count // 2], tuple(n // 2 for n in counts))
        return small, small.complement(count, present)

    def at_level(self, level: float) -> dict[str, Any]:
        """Refuse: how much a threshold merges depends on the images."""
        raise ValueError(
            "a budget of atm needs images: use foveate.methods.atm.calibrate(model, images, budget)"
        )

    def own_macs(self, block: int, hook: str, tokens: int) -> int:
        """Count the comparisons of every token of one set with every token of the other."""
        assert self.spec is not None
        if hook != "between" or not self.acts_between(block):
            return 0
        patches = tokens - self.spec.prefix
        return (patches // 2) * (patches - patches // 2) * self.spec.head_dim


def _of(values: Tensor, selection: Selection) -> Tensor:
    """Return the values of the selected tokens, ``[B, K, d]``, from ``values [B, N, d]``."""
    return values.gather(1, selection.index[..., None].expand(-1, -1, values.shape[2]))


def calibrate(model: ReducedViT, images: Tensor, budget: str) -> str:
    """Shift atm's thresholds until the given images cost a budget on average.

    The thresholds become the ``threshold`` option of the model's method, so they are saved with it.
    Other images of the same kind then cost nearly as much. A few dozen images are enough.

    Args:
        model: a model from ``foveate.apply`` with the method atm; its thresholds are the start.
        images: preprocessed images ``[B, channels, H, W]`` on the model's device.
        budget: mean multiply-adds of an image, such as "3.0 GMACs", "0.7x" or "70%".

    Returns:
        The method with its thresholds, as ``foveate.apply`` reads it.
    """
    reducer, backbone = model.reducer, model.backbone
    if not isinstance(reducer, ATM):
        raise ValueError(f"calibrate needs a model with the method atm, got {reducer!r}")
    spec, grid = backbone.spec, backbone.grid_of(images)
    target = parse_budget(budget, cost(spec, None, grid).total)
    start = tuple(reducer.thresholds.values())

    def shifted(shift: float) -> tuple[float, ...]:
        return tuple(round(min(1.0, max(-1.0, t - shift)), 6) for t in start)

    def macs(threshold: tuple[float, ...]) -> float:
        trial = ATM(**{**reducer.config(), "threshold": threshold})
        trial.build(spec)
        driven = type(model)(backbone, trial)
        traces = (driven.trace(part) for part in images.split(_AT_ONCE))
        tokens = [image for trace in traces for image in measured(trace)]
        return fmean(cost(spec, trial, grid, blocks).total for blocks in tokens)

    with evaluating(model):
        ends = low, high = min(start) - 1, max(start) + 1  # nothing merges; half of the tokens do
        tried: dict[tuple[float, ...], float] = {}
        for _ in range(_STEPS):
            middle = (low + high) / 2
            found = tried[shifted(middle)] = macs(shifted(middle))
            if abs(found - target) <= _GOOD * target:
                break
            low, high = (middle, high) if found > target else (low, middle)
        best = min(tried, key=lambda threshold: abs(tried[threshold] - target))
        if abs(tried[best] - target) > _TOLERANCE * target:
            most, least = (macs(shifted(end)) / 1e9 for end in ends)
            raise ValueError(
                f"atm cannot meet {target / 1e9:.4g} GMACs within {_TOLERANCE:.0%} on these "
                f"images: it reaches from {least:.4g} to {most:.4g}; the cost nearest to the "
                f"budget is {tried[best] / 1e9:.4g}"
            )
    reducer.threshold = best
    reducer.build(spec)
    return repr(reducer)
