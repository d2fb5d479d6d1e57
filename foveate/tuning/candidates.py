"""What can be searched: methods, curves of token counts over the blocks, and what each costs.

A curve says how reduction is spread over the blocks, and a level how much of it there is. The level
is solved so that the candidate costs what the target allows and no more.
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
_NEAR = 0.0025  # of the goal: so far above it a price may be, and so near below is enough
_STEPS = 5000  # of the level
Recall = int | str | None


@dataclass(frozen=True, eq=False)
class Template:
    """A method with the options that the search leaves alone.

    Attributes:
        label: the method as it was asked for.
        reducer: the method, built for the model.
        recalls: blocks before which patches may come back; the first is the method's own.
        note: what is otherwise than in the model that was given, or "".
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
        words: for tables.
        weights: for each block its part of all the patches that leave.
    """

    words: str
    weights: tuple[float, ...]

    def left(self, level: float, patches: int) -> list[int]:
        """Return the patches left after each block; at level 1 a single one at the end."""
        whole, gone = sum(self.weights), itertools.accumulate(self.weights)
        return [patches - round(level * (patches - 1) * part / whole) for part in gone]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method with a schedule.

    Attributes:
        template: the method.
        curve: how reduction is spread; None is the method's own constant rate.
        recall: block before which patches come back.
        reducer: the method with its options, built.
        blocks: tokens of every block.
        price: what it costs, in the unit of the target.
    """

    template: Template
    curve: Curve | None
    recall: Recall
    reducer: Reducer = field(repr=False)
    blocks: tuple[BlockTokens, ...] = field(repr=False)
    price: float

    @property
    def method(self) -> str:
        """The method as ``foveate.apply`` reads it."""
        return repr(self.reducer)

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
        methods: those that were asked for, with options if need be; None for all.
        own: the method that the model was trained with.
        recalls: whether patches that come back before the last blocks are worth a try.
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
            note = f"{reducer.name} is searched with as many patches in every image (gate='topk')"
        found.append(Template(text, reducer, _recalls(reducer, spec, recalls), note))
    return found, left_out


def _fixed(own: Reducer) -> Reducer:
    """Return a trained method as it is, or with gates that keep one count in all images."""
    if own.fixed_count or not hasattr(own, "gate"):
        return own
    return remake(own, {"gate": "topk"})


def _reducing_nothing(given: Reducer, spec: BackboneSpec) -> Reducer:
    """Build a method so that it fits any model; ValueError if what the search sets is given."""
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
    """Say why a method cannot be searched, or ""."""
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
    """Return where patches may come back: as the method was given, and before late blocks."""
    own = reducer.recall_before
    if own != type(reducer)().recall_before:  # the user's word
        return (own,)
    if not wanted or not (reducer.drops or reducer.merges):
        return (own,)
    late = {spec.depth - back for back in (1, 2, max(3, spec.depth // 4))}
    return (own, *sorted((block for block in late if block >= 1), reverse=True))


# Curves ------------------------------------------------------------------------------------------


def curves(depth: int, recall: Recall) -> list[Curve]:
    """Return curves to begin with: where reduction starts, and how it is spread from there on.

    Args:
        depth: number of blocks.
        recall: block before which patches come back, after which nothing leaves.
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
    """What candidates cost.

    Attributes:
        spec: facts of the model.
        dense: what the model costs without a method.
        goal: what a candidate may cost.
        own: what each method costs itself, as the kind of price has it.
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
        """Learn from some candidates what their methods do besides the blocks."""
        raise NotImplementedError

    def said(self, price: float) -> str:
        """Say a price in words."""
        raise NotImplementedError

    def times(self, price: float) -> float:
        """Return how many times as fast, or as cheap, as the dense model that is."""
        return self.dense / price


def _key(template: Template, reducer: Reducer) -> tuple[str, bool]:
    """Return what own work depends on: the method, and whether patches are followed."""
    return repr(template.reducer), bool(reducer.recall_blocks)


@dataclass(eq=False)
class Macs(Price):
    """Multiply-adds of one image; ``own`` is a method's own as a share of the model's."""

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
        """Count a method's own products once; they are a small share of all."""
        for one in candidates:
            plain = cost(self.spec, one.reducer, self.spec.grid, one.blocks, own=False).total
            method = on_meta(one.reducer)
            assert isinstance(method, Reducer)
            exact = run_on_meta(self.spec, method, self.spec.grid).total
            self.own[_key(one.template, one.reducer)] = exact / plain - 1

    def said(self, price: float) -> str:
        """Say them in giga."""
        return f"{price / 1e9:.3g} GMACs, {price / self.dense:.0%} of the dense model's"


@dataclass(eq=False)
class Times(Price):
    """Milliseconds of a pass, as the latency table predicts them.

    ``own`` is a method's own work in a block where it acts.

    Attributes:
        table: the table.
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
        """Time a method once beside the dense model; what is known already is not timed again."""
        named = {one.method: one for one in candidates}
        reducers = {method: one.reducer for method, one in named.items()}
        for method, found in own_work(backbone, self.table, reducers, progress).items():
            one = named[method]
            self.own[_key(one.template, one.reducer)] = found

    def correct(self, candidate: Candidate, ms: float) -> None:
        """Learn that a candidate takes so long, in milliseconds of the time of the table."""
        acting = max(1, self.table.acting(candidate.blocks))
        more = (ms - self.table.predict_pass(candidate.blocks)) / acting
        self.own[_key(candidate.template, candidate.reducer)] = more

    def said(self, price: float) -> str:
        """Say it with how many times as fast it is."""
        return f"{price:.3g} ms, {self.times(price):.2f}x as fast as the dense model"


def price_of(target: str, backbone: Backbone) -> Price:
    """Return what measures candidates by a target; ValueError for one that the model meets.

    Args:
        target: a budget, as ``foveate.apply`` takes it.
        backbone: parts of the model.
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
        raise ValueError(f"the model meets the target {target!r} as it is: nothing is to be done")
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
        goal: what it may cost; None for that of the price.
    """
    goal = price.goal if goal is None else goal
    low, high = 0, _STEPS
    before, best = price.dense, _at(high, template, curve, recall, price)
    if best is None or best.price > goal * (1 + _NEAR):
        return None
    known = {best.method: best}
    for turn in itertools.count():
        if high - low <= 1 or best.price >= goal * (1 - _NEAR):
            return best
        # The price falls almost in a straight line; halving now and then makes sure of the end.
        share = (before - goal) / max(before - best.price, 1e-9 * goal) if turn % 3 < 2 else 0.5
        middle = low + round((high - low) * share)
        middle = min(max(middle, low + 1), high - 1)
        now = _at(middle, template, curve, recall, price, known)
        assert now is not None
        if now.price > goal * (1 + _NEAR):
            low, before = middle, now.price
        else:
            high, best = middle, now
    raise AssertionError("the loop ends by itself")


def cheapest(templates: Sequence[Template], price: Price) -> Candidate:
    """Return the candidate that costs least of all, whatever it answers."""
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

    ``known`` are candidates by method; many steps round to the same one.
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
