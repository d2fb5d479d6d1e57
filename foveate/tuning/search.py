"""The search: few images sort candidates out, more decide, and moves improve the best."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from foveate.core import ReducedViT
from foveate.tuning.agreement import Agreement, Judge
from foveate.tuning.candidates import Candidate, Curve, Price, Recall, Template, curves, solve

__all__ = ["Found", "Scored", "search"]

_FIRST = 4  # images of the first comparison; each one has twice as many
_STAY = 1 / 3  # share of the candidates that stay, each time
_IMPROVED = 2  # number of methods whose best schedule is improved
_RECALLED = 3  # number of curves of a method that are tried with patches that come back
_STEPS = (0.3, 0.15, 0.05)  # share of all reduction that a move adds to a block, in turn
_LIKELY, _SURE = 1.0, 2.0  # standard errors that a move, and a schedule over a constant, gain
_IMPROVED_WORDS = ", improved"
_Asked = tuple[Template, Curve | None, Recall]
Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class Scored:
    """A candidate, and what the judge measured on each image."""

    candidate: Candidate
    model: ReducedViT = field(repr=False)
    judge: Judge = field(repr=False)
    _seen: dict[int, tuple[float, bool | None]] = field(default_factory=dict, repr=False)

    def beats(self, other: Scored, numbers: Sequence[int], errors: float) -> bool:
        """Return whether the distance is below another's by ``errors`` standard errors.

        The standard error is that of the differences by image; a smaller gain may be chance.
        """
        self.on(numbers), other.on(numbers)
        gains = [other._seen[number][0] - self._seen[number][0] for number in numbers]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return statistics.fmean(gains) > errors * error

    @classmethod
    def of(cls, candidate: Candidate, judge: Judge) -> Scored:
        """Wrap a candidate with its model."""
        return cls(candidate, judge.model(candidate.reducer), judge)

    def on(self, numbers: Sequence[int]) -> Agreement:
        """Return the agreement on some images; run only those that were not run before."""
        new = [number for number in numbers if number not in self._seen]
        self._seen.update(zip(new, self.judge.compare(self.model, new), strict=True))
        seen = [self._seen[number] for number in numbers]
        same = [one for _, one in seen if one is not None]
        return Agreement(
            math.fsum(distance for distance, _ in seen) / len(seen),
            sum(same) / len(same) if same else None,
        )


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found; the first of the best is its choice.

    Attributes:
        constants: for each method, the constant rate that meets the target.
        best: for each method, what agreed best on the choosing images, the best method first.
        tried: number of candidates that were compared with the dense model.
    """

    constants: tuple[Scored, ...]
    best: tuple[Scored, ...]
    tried: int


def search(
    templates: Sequence[Template],
    price: Price,
    judge: Judge,
    *,
    tries: int,
    seed: int,
    progress: Progress,
) -> Found:
    """Search methods and schedules by their agreement on the choosing images.

    Args:
        templates: the methods.
        price: computes what candidates cost, and has the goal.
        judge: compares candidates with the dense model.
        tries: number of moves that are tried to improve each of the best schedules.
        seed: seed of the order of moves.
        progress: called with the step, how much of it is done, and of how much.
    """
    looked = _Search(price, judge, progress)
    first: list[_Asked] = [
        (template, curve, template.recalls[0])
        for template in templates
        for curve in (None, *curves(price.spec.depth, template.recalls[0]))
    ]
    ranked = looked.halved(looked.made("schedules", first))
    recalled = [
        (template, one.candidate.curve, recall)
        for template in templates
        for one in _of(ranked, template)[:_RECALLED]
        for recall in template.recalls[1:]
    ]
    if recalled:
        ends = [_ended(*one, price.spec.depth) for one in recalled]
        ranked = looked.halved([*ranked, *looked.made("schedules with recall", ends)])
    draw = random.Random(seed)
    tops = [found[0] for template in templates if (found := _of(ranked, template))]
    for one in sorted(tops, key=looked.distance)[:_IMPROVED]:
        shaped = [other for other in _of(ranked, one.candidate.template) if other.candidate.curve]
        if shaped:
            tops[tops.index(one)] = looked.improved(shaped[0], tries, draw)
    constants = [one for one in ranked if _plain(one.candidate)]
    best = []
    for one in tops:
        own = [plain for plain in constants if plain.candidate.template is one.candidate.template]
        clear = not own or one.beats(own[0], looked.choosing, _SURE)
        best.append(one if clear else own[0])
    return Found(tuple(constants), tuple(sorted(best, key=looked.distance)), looked.tried)


def _plain(candidate: Candidate) -> bool:
    """Return whether this is the method's constant rate, with its own recall."""
    return candidate.curve is None and candidate.recall == candidate.template.recalls[0]


def _of(ranked: Iterable[Scored], template: Template) -> list[Scored]:
    return [one for one in ranked if one.candidate.template is template]


def _ended(template: Template, curve: Curve | None, recall: Recall, depth: int) -> _Asked:
    """End a curve at the block before which patches come back."""
    if curve is not None:
        curve = Curve(curve.words, _before(curve.weights, recall))
    return template, curve, recall


def _before(weights: Sequence[float], recall: Recall) -> tuple[float, ...]:
    """Return weights that are zero from ``recall`` on, unless none would be left."""
    if not isinstance(recall, int) or not any(weights[:recall]):
        return tuple(weights)
    return (*weights[:recall], *[0.0] * (len(weights) - recall))


def _moves(candidate: Candidate, step: float) -> list[tuple[tuple[float, ...], Recall]]:
    """Return curves near that of a candidate, each with the block before which patches come back.

    In them more leaves in one block, less leaves in one block, or all leaves one block earlier or
    later. The level is solved again afterwards, so all other blocks make up for the change.
    """
    assert candidate.curve is not None
    recall, whole = candidate.recall, sum(candidate.curve.weights)
    weights = [weight / whole for weight in candidate.curve.weights]
    end = recall if isinstance(recall, int) else len(weights)
    found = [[*weights[1:end], 0.0, *weights[end:]], [0.0, *weights[: end - 1], *weights[end:]]]
    for block in range(end):
        more, fewer = [weight * (1 - step) for weight in weights], list(weights)
        more[block] += step
        fewer[block] *= 1 - 3 * step
        found += [more, fewer] if weights[block] else [more]
    moves = [(tuple(one), recall) for one in found if any(one)]
    others = [one for one in candidate.template.recalls if one != recall]
    return moves + [(_before(weights, other), other) for other in others]


class _Search:
    """Holds what the steps of a search share."""

    def __init__(self, price: Price, judge: Judge, progress: Progress) -> None:
        self.price, self.judge, self.progress = price, judge, progress
        self.choosing = judge.pictures.choosing
        self.tried = 0

    def distance(self, one: Scored) -> float:
        """Return the distance on all images that choose."""
        return one.on(self.choosing).distance

    def made(self, what: str, given: Sequence[_Asked]) -> list[Scored]:
        """Solve for the target; leave out what cannot reach it, and what is there already."""
        found: dict[str, Scored] = {}
        for done, (template, curve, recall) in enumerate(given):
            self.progress(f"solving {what}", done, len(given))
            candidate = solve(template, curve, recall, self.price)
            if candidate is not None and candidate.method not in found:
                found[candidate.method] = Scored.of(candidate, self.judge)
        self.tried += len(found)
        return list(found.values())

    def halved(self, pool: Sequence[Scored]) -> list[Scored]:
        """Compare on more and more images, each time only the best of those before.

        The constant rates and the best curve of each method always stay. Return those that were
        compared on all images, the best first.
        """
        size = min(_FIRST, len(self.choosing))
        while True:
            part = self.choosing[:size]
            for done, one in enumerate(pool):
                self.progress(f"{len(pool)} schedules on {size} images", done, len(pool))
                one.on(part)
            ranked = sorted(pool, key=lambda one: one.on(part).distance)
            if size == len(self.choosing):
                return ranked
            most, seen, stay = math.ceil(len(pool) * _STAY), set(), []
            for place, one in enumerate(ranked):
                template, shaped = one.candidate.template, one.candidate.curve is not None
                if place < most or not shaped or template not in seen:
                    stay.append(one)
                if shaped:
                    seen.add(template)
            pool, size = stay, min(2 * size, len(self.choosing))

    def improved(self, one: Scored, tries: int, draw: random.Random) -> Scored:
        """Move reduction between blocks, at the same price, as long as that helps.

        A move is tried on a few images first and must help there already.
        """
        few = self.choosing[: max(min(_FIRST, len(self.choosing)), len(self.choosing) // 4)]
        label, tried = one.candidate.template.label, 0
        for number, step in enumerate(_STEPS, start=1):
            moves = _moves(one.candidate, step)
            draw.shuffle(moves)
            while moves and tried < tries * number // len(_STEPS):
                self.progress(f"improving {label}", tried, tries)
                weights, recall = moves.pop()
                template, curve = one.candidate.template, one.candidate.curve
                assert curve is not None
                words = curve.words.removesuffix(_IMPROVED_WORDS) + _IMPROVED_WORDS
                candidate = solve(template, Curve(words, weights), recall, self.price)
                if candidate is None or candidate.method == one.candidate.method:
                    continue
                tried += 1
                other = Scored.of(candidate, self.judge)
                if other.on(few).distance >= one.on(few).distance:
                    continue
                if other.beats(one, self.choosing, _LIKELY):
                    one, moves = other, _moves(candidate, step)
                    draw.shuffle(moves)
        self.tried += tried
        return one
