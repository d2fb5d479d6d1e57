"""The candidates of a search: methods, curves of token counts over the blocks, and their prices.

A curve says how reduction is spread over the blocks, and a level says how strong it is. The level
is solved so that a candidate costs what the target allows and no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.core import Backbone, BackboneSpec, Chain, Reducer
from foveate.core.budget import parse_budget
from foveate.core.cost import BlockTokens, cost, on_meta, run_on_meta, tokens_of
from foveate.latency import (
    LatencyTable,
    TimeBudget,
    goal_of,
    is_time,
    own_work,
    setting_of,
)
from foveate.registry import list_methods, make, parse, remake

__all__ = [
    *("RANDOM", "Candidate", "Curve", "Macs", "Price", "Template", "Times", "cheapest", "curves"),
    *("price_of", "solve", "templates"),
]

RANDOM = "random"
_NEAR = 0.0025  # share of the goal: a price may be this far above it, and this far below is enough
_STEPS = 5000  # number of steps of the level
Recall = int | str | None


@dataclass(frozen=True, eq=False)
class Template:
    """A method with the options that the search does not change.

    Attributes:
        label: the method as it was asked for.
        reducer: the method, built for the model.
        recalls: blocks before which patches may come back; the first is the method's own setting.
        note: how the method differs from that of the given model, or "".
    """

    label: str
    reducer: Reducer
    recalls: tuple[Recall, ...] = (None,)
    note: str = ""

    def make(self, options: Mapping[str, Any]) -> Reducer:
        """Build the method with other options and the same trained parts."""
        return remake(self.reducer, options)


@dataclass(frozen=True)
class Curve:
    """How reduction is spread over the blocks.

    Attributes:
        words: name of the curve, for tables.
        weights: for each block, its share of all patches that leave.
    """

    words: str
    weights: tuple[float, ...]

    def left(self, level: float, patches: int) -> list[int]:
        """Return the patches left after each block; level 1 leaves a single one at the end."""
        whole, gone = sum(self.weights), itertools.accumulate(self.weights)
        return [patches - round(level * (patches - 1) * part / whole) for part in gone]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method with a schedule.

    Attributes:
        template: the method.
        curve: how reduction is spread; None is the method's own constant rate.
        recall: block before which patches come back.
        reducer: the built method with its options.
        blocks: tokens of every block.
        price: cost of the candidate, in the unit of the target.
    """

    template: Template
    curve: Curve | None
    recall: Recall
    reducer: Reducer = field(repr=False)
    blocks: tuple[BlockTokens, ...] = field(repr=False)
    price: float

    @property
    def method(self) -> str:
        """The method as a string for ``foveate.apply``."""
        return repr(self.reducer)

    @property
    def shape(self) -> tuple[Template, Curve | None, Recall]:
        """The method and how it spreads reduction, whatever the rate."""
        return self.template, self.curve, self.recall

    @property
    def tokens(self) -> list[int]:
        """Tokens that each block feeds forward."""
        return [block.mlp for block in self.blocks]

    @property
    def schedule(self) -> str:
        """The schedule in words."""
        words = "constant" if self.curve is None else self.curve.words
        return words if self.recall is None else f"{words}, recall before {self.recall}"


# Methods -----------------------------------------------------------------------------------------


def templates(
    spec: BackboneSpec, methods: Sequence[str] | None, own: Reducer | None, *, recalls: bool
) -> tuple[list[Template], dict[str, str]]:
    """Return the methods to search, and why others are left out.

    Args:
        spec: facts of the model.
        methods: methods that were asked for, perhaps with options; None takes all.
        own: the method that the model was trained with, or None.
        recalls: whether to try schedules in which patches come back before the last blocks.
    """
    found, left_out = [], {}
    own = None if own is None else _fixed(own)
    given = [*list_methods()] if methods is None else list(methods)
    if own is not None and (methods is None or own.name not in given):
        given = [own.name, *(name for name in given if name != own.name)]
    if not any(text.partition("(")[0].strip() == RANDOM for text in given):
        given.append(RANDOM)
    for text in given:
        trained = own is not None and text == own.name
        reducer = own if own is not None and trained else _reducing_nothing(parse(text), spec)
        why = _why_not(reducer, trained=trained)
        if why and methods is not None and text in methods:
            raise ValueError(f"{text} cannot be searched: {why}")
        if why:
            left_out[text] = why
            continue
        note = ""
        if trained and getattr(reducer, "gate", None) == "topk":
            note = f"{reducer.name} is searched with equal counts in all images (gate='topk')"
        found.append(Template(text, reducer, _recalls(reducer, spec, recalls), note))
    return found, left_out


def _fixed(own: Reducer) -> Reducer:
    """Return a trained method; if it can, its gates keep the same count in all images."""
    if own.fixed_count or not hasattr(own, "gate"):
        return own
    return remake(own, {"gate": "topk"})


def _reducing_nothing(given: Reducer, spec: BackboneSpec) -> Reducer:
    """Build a method at a rate that fits any model; refuse options that the search sets."""
    if isinstance(given, Chain):
        return given
    found = make(given.name, {**given.config(), **(given.identity or {})})
    found.build(spec)
    if not found.rate or not found.fixed_count:
        return found
    patches, plain = spec.grid[0] * spec.grid[1], type(given)().config()
    for name in {**found.at_level(0.5), **(found.at_counts([patches // 2] * spec.depth) or {})}:
        if given.config()[name] != plain[name]:
            raise ValueError(f"the search sets {name} itself: leave it out of {given!r}")
    return found


def _why_not(reducer: Reducer, *, trained: bool) -> str:
    """Return the reason why a method cannot be searched, or ""."""
    if isinstance(reducer, Chain):
        return "a chain has no rate of its own"
    if not reducer.fixed_count:
        return "the number of tokens differs from image to image, and so does the cost"
    if not trained and next(reducer.parameters(), None) is not None:
        return "learned parts must be trained first (foveate reduce)"
    if not reducer.rate:
        return "there is no rate that could be set to meet a target"
    return ""


def _recalls(reducer: Reducer, spec: BackboneSpec, wanted: bool) -> tuple[Recall, ...]:
    """Return the blocks before which patches may come back: the method's own, then late ones."""
    own = reducer.recall_before
    if own != type(reducer)().recall_before:  # the user has set it
        return (own,)
    if not wanted or not (reducer.drops or reducer.merges):
        return (own,)
    late = {spec.depth - back for back in (1, 2, max(3, spec.depth // 4))}
    return (own, *sorted((block for block in late if block >= 1), reverse=True))


# Curves ------------------------------------------------------------------------------------------


def curves(depth: int, recall: Recall) -> list[Curve]:
    """Return the curves that a search begins with: all starts, with all spreads from there on.

    Args:
        depth: number of blocks.
        recall: block before which patches come back; no patch leaves after it.
    """
    end = recall if isinstance(recall, int) else depth
    starts = {0, depth // 6, depth // 4, depth // 3, depth // 2, 2 * depth // 3}
    found: dict[tuple[float, ...], Curve] = {}
    for start in sorted(block for block in starts if block < end):
        length = end - start
        stages = {start + length * part // 3 for part in range(3)}
        spreads = {
            "even": [1.0] * length,
            "falling": [float(length - i) for i in range(length)],
            "rising": [float(1 + i) for i in range(length)],
            "three stages": [float(start + i in stages) for i in range(length)],
            "at once": [float(i == 0) for i in range(length)],
        }
        for words, part in spreads.items():
            weights = (*[0.0] * start, *part, *[0.0] * (depth - end))
            shape = tuple(weight / sum(weights) for weight in weights)
            place = f"in block {start}" if words == "at once" else f"from block {start}"
            found.setdefault(shape, Curve(f"{words} {place}", shape))
    return list(found.values())


# Prices ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Price:
    """Computes what candidates cost.

    Attributes:
        spec: facts of the model.
        dense: cost of the model without a method.
        goal: largest cost that a candidate may have.
        own: cost of each method's own work, in the unit of the subclass.
    """

    spec: BackboneSpec
    dense: float
    goal: float
    own: dict[tuple[str, bool], float] = field(default_factory=dict, init=False)

    def of(self, template: Template, reducer: Reducer) -> tuple[float, tuple[BlockTokens, ...]]:
        """Return the price of a built method and the tokens of its blocks."""
        raise NotImplementedError

    def learn(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Measure on some candidates what their methods cost besides the blocks."""
        raise NotImplementedError

    def said(self, price: float) -> str:
        """Describe a price in words."""
        raise NotImplementedError

    def times(self, price: float) -> float:
        """Return how many times as fast, or as cheap, as the dense model a price is."""
        return self.dense / price


def _key(template: Template, reducer: Reducer) -> tuple[str, bool]:
    """Return what own work depends on: the method, and whether patches come back."""
    return repr(template.reducer), bool(reducer.recall_blocks)


@dataclass(eq=False)
class Macs(Price):
    """Counts multiply-adds of one image; ``own`` holds shares of the model's."""

    def of(self, template: Template, reducer: Reducer) -> tuple[float, tuple[BlockTokens, ...]]:
        """Count the model's multiply-adds at the tokens that are left, and the method's own."""
        blocks = tokens_of(self.spec, reducer)
        plain = cost(self.spec, reducer, self.spec.grid, blocks, own=False).total
        return plain * (1 + self.own.get(_key(template, reducer), 0.0)), blocks

    def learn(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Count each method's own products once; they are a small share of all."""
        for one in candidates:
            plain = cost(self.spec, one.reducer, self.spec.grid, one.blocks, own=False).total
            method = on_meta(one.reducer)
            assert isinstance(method, Reducer)
            exact = run_on_meta(self.spec, method, self.spec.grid).total
            self.own[_key(one.template, one.reducer)] = exact / plain - 1

    def said(self, price: float) -> str:
        """Describe a price in GMACs."""
        return f"{price / 1e9:.3g} GMACs, {price / self.dense:.0%} of the dense model's"


@dataclass(eq=False)
class Times(Price):
    """Predicts the milliseconds of a pass from the latency table.

    ``own`` holds the milliseconds of a method's own work in a block where it acts.

    Attributes:
        table: the latency table.
        wanted: the target.
    """

    table: LatencyTable
    wanted: TimeBudget

    def of(self, template: Template, reducer: Reducer) -> tuple[float, tuple[BlockTokens, ...]]:
        """Read the table at the tokens of each block, and add the method's own work."""
        blocks = tokens_of(self.spec, reducer)
        return self.table.predict_pass(blocks, self.own.get(_key(template, reducer), 0.0)), blocks

    def learn(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Time each method beside the dense model, unless it was timed before."""
        named = {one.method: one for one in candidates}
        reducers = {method: one.reducer for method, one in named.items()}
        for method, found in own_work(backbone, self.table, reducers, progress).items():
            one = named[method]
            self.own[_key(one.template, one.reducer)] = found

    def correct(self, candidate: Candidate, ms: float) -> None:
        """Correct a method's own work so that a candidate takes ``ms``, at the table's speed."""
        acting = max(1, self.table.acting(candidate.blocks))
        more = (ms - self.table.predict_pass(candidate.blocks)) / acting
        self.own[_key(candidate.template, candidate.reducer)] = more

    def said(self, price: float) -> str:
        """Describe a price in milliseconds, and as a speed-up."""
        return f"{price:.3g} ms, {self.times(price):.2f}x as fast as the dense model"


def price_of(target: str, backbone: Backbone) -> Price:
    """Return the price for a target; raise ValueError if the model meets it without a method.

    Args:
        target: a budget, as ``foveate.apply`` takes it.
        backbone: the model's parts.
    """
    spec = backbone.spec
    if is_time(target):
        wanted = TimeBudget.parse(target)
        setting = setting_of(backbone, wanted.batch, wanted.dtype)
        table, goal = goal_of(wanted, setting, backbone)
        price: Price = Times(spec, table.whole(spec.depth), goal, table, wanted)
    else:
        whole = cost(spec, None, spec.grid).total
        price = Macs(spec, whole, parse_budget(target, whole))
    if price.goal >= price.dense:
        raise ValueError(f"the dense model meets the target {target!r}: there is nothing to search")
    return price


# Solving -----------------------------------------------------------------------------------------


def solve(
    template: Template,
    curve: Curve | None,
    recall: Recall,
    price: Price,
    goal: float | None = None,
) -> Candidate | None:
    """Return the candidate that reduces least within the goal; None if none is cheap enough.

    Args:
        template: the method.
        curve: how reduction is spread; None takes the method's own constant rate.
        recall: block before which patches come back.
        price: what candidates cost.
        goal: largest cost that it may have; None takes that of the price.
    """
    goal = price.goal if goal is None else goal
    low, high = 0, _STEPS
    before, best = price.dense, _at(high, template, curve, recall, price)
    if best is None or best.price > goal * (1 + _NEAR):
        return None
    known = {best.method: best}
    turn = 0
    while high - low > 1 and best.price < goal * (1 - _NEAR):
        # The price falls almost in a straight line; every third turn halves, so that it ends.
        share = (before - goal) / max(before - best.price, 1e-9 * goal) if turn % 3 < 2 else 0.5
        middle = low + round((high - low) * share)
        middle = min(max(middle, low + 1), high - 1)
        now = _at(middle, template, curve, recall, price, known)
        assert now is not None
        if now.price > goal * (1 + _NEAR):
            low, before = middle, now.price
        else:
            high, best = middle, now
        turn += 1
    return best


def cheapest(templates: Sequence[Template], price: Price) -> Candidate:
    """Return the candidate that costs least, whatever its agreement."""
    found = [
        _at(_STEPS, template, curve, template.recalls[0], price)
        for template in templates
        for curve in (None, *curves(price.spec.depth, template.recalls[0]))
    ]
    return min((one for one in found if one is not None), key=lambda one: one.price)


def _at(
    step: int,
    template: Template,
    curve: Curve | None,
    recall: Recall,
    price: Price,
    known: dict[str, Candidate] | None = None,
) -> Candidate | None:
    """Return the candidate at one of the steps of the level; None if the method has no curves.

    ``known`` holds candidates by method, because many steps round to the same one.
    """
    spec, level = price.spec, step / _STEPS
    options: Mapping[str, Any] | None = template.reducer.at_level(level)
    if curve is not None:
        left = curve.left(level, spec.grid[0] * spec.grid[1])
        options = template.reducer.at_counts(left)
    if options is None:
        return None
    rounded = {n: round(v, 6) if isinstance(v, float) else v for n, v in options.items()}
    if recall != template.reducer.recall_before:
        rounded["recall_before"] = recall
    reducer = template.make(rounded)
    known = {} if known is None else known
    method = repr(reducer)
    if method not in known:
        paid, blocks = price.of(template, reducer)
        known[method] = Candidate(template, curve, recall, reducer, blocks, paid)
    return known[method]
