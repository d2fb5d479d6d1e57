"""``tune``: search on half of the images, report on the other half, and save the choice."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor, nn

from foveate import machine
from foveate.api import apply, check_driven
from foveate.backbones import backbone_for
from foveate.convert import open_base, save
from foveate.convert.folders import note_measured
from foveate.core import Backbone, ReducedViT, Reducer
from foveate.dense import Hosting
from foveate.facts import count as count_costs
from foveate.files import made_folder
from foveate.latency import Setting, beside_dense, is_time, setting_of
from foveate.measure.table import pd
from foveate.timing import DENSE, LEAST_ROUNDS, Timings
from foveate.tuning.agreement import Judge, Paths, kind_of, read_pictures
from foveate.tuning.candidates import (
    RANDOM,
    Candidate,
    Price,
    Template,
    Times,
    cheapest,
    price_of,
    solve,
    templates,
)
from foveate.tuning.result import COLUMNS, Tuned, speeds
from foveate.tuning.search import Found, Progress, Scored, search

__all__ = ["tune"]

_SAVINGS = (0.5, 0.75, 1.25)  # shares of what the target saves: other speeds, for the frontier
_ALIKE = 0.99  # speeds that differ by less count as one on the frontier
_NEAR = 0.02  # a choice whose time misses the target by more than this share is corrected,
_AGAIN = 2  # at most this often
_PROMISE = 0.05  # a choice that still misses it by more is replaced, or gets a note


def tune(
    model: nn.Module | str | os.PathLike[str],
    images: Tensor | Paths,
    target: str = "1.5x faster",
    *,
    methods: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    count: int = 64,
    judge: str | None = None,
    seed: int = 0,
    tries: int = 60,
    rounds: int = LEAST_ROUNDS,
    name: str | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Search for the method and schedule with which a model agrees best with the dense model.

    Neither labels nor training are needed. Half of the images choose, and the other half report.
    Dropping patches at random is always in the table. The result has the table, the choice and a
    folder that ``foveate.load`` opens.

    Args:
        model: a plain ViT or one with a trained method; or a string that commands take as MODEL.
        images: files and folders, or preprocessed images ``[N, channels, H, W]``.
        target: what a pass may cost, like ``budget`` of ``foveate.apply``: "1.5x faster", "12 ms",
            "12 ms, batch 8", "2.4 GMACs", "60%".
        methods: methods to search, such as "tome" or "tome(prop_attn=False)"; None takes all that
            run without training.
        out: folder for the choice, the table and the picture, which must be empty or missing; None
            takes runs/tune-NAME.
        count: number of images, drawn at random if there are more.
        judge: what is compared: "classes", or "features" of all patches of the grid; None takes
            classes if the model has any.
        seed: seed of the drawing of images and of the order of moves.
        tries: number of moves that are tried to improve each of the best two schedules.
        rounds: number of timed rounds at the end; 0 times only what a target in time needs, and
            fewer than 30 are a trial.
        name: name of the model; None takes its own.
        progress: called with the step, how much of it is done, and of how much.
    """
    told = progress or (lambda what, done, of: None)
    if not isinstance(model, nn.Module):
        name = name or Path(model).name
        model = open_base(os.fspath(model))
    for what, number in (("tries", tries), ("rounds", rounds), ("seed", seed)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{what} must be a whole number from 0, got {number!r}")
    vit, own = _parts(model)
    name = name or type(vit).__name__
    backbone = backbone_for(vit)
    kind = kind_of(backbone, judge)
    found, left_out = templates(backbone.spec, methods, own, recalls=kind == "features")
    pictures = read_pictures(vit, images, count, seed)
    folder = _folder(out, name)
    with made_folder(folder):
        check_driven(backbone)
        told("timing blocks" if is_time(target) else "counting", 0, 1)
        price = price_of(target, backbone)
        if not _learn(price, backbone, found, told):
            _check_reachable(target, found, price)
        told("dense model", 0, 1)
        looked = Judge(backbone, pictures, kind)
        best = search(found, price, looked, tries=tries, seed=seed, progress=told)
        table = _Table(looked, price, backbone, told)
        table.add(best)
        notes = table.time(rounds, target) if rounds else []
        notes += [one.note for one in found if one.note] + _left_out(left_out) + table.doubts()
        notes += _unmet(found, best)
        chosen = table.choice.candidate
        notes += _chance(found, chosen)
        reduced = apply(vit, chosen.reducer, check=False).eval()
        save(reduced, folder, everything=True)
    facts, commit = machine.facts(next(vit.parameters()).device.type), machine.commit()
    if rounds >= LEAST_ROUNDS:  # a card takes no trials
        timed = table.speed(rounds) | {"machine": machine.name(facts), "commit": commit}
        note_measured(folder, [timed])
    about = {
        "model": name,
        "target": target,
        "judge": kind,
        "seed": seed,
        "tries": tries,
        "rounds": rounds,
        "tried": best.tried,
        "choosing": len(pictures.choosing),
        "reporting": len(pictures.reporting),
        "predicted": _predicted(price),
        "measured": table.measured(rounds),
        "images": {
            half: [pictures.names[number] for number in getattr(pictures, half)]
            for half in ("choosing", "reporting")
        },
        "left_out": left_out,
        "machine": facts,
        "commit": commit,
    }
    result = Tuned(
        path=folder,
        table=table.frame(),
        choice=chosen.method,
        model=reduced,
        about=about,
        notes=tuple(notes),
        commands=tuple(_commands(folder, images, backbone, chosen)),
    )
    told("writing", 0, 1)
    result.write()
    return result


# Before the work ---------------------------------------------------------------------------------


def _parts(model: nn.Module) -> tuple[nn.Module, Reducer | None]:
    """Return the plain ViT, and the method that it was trained with, if any."""
    if isinstance(model, Hosting):
        raise ValueError(
            f"a {type(model).__name__} cannot be searched itself: give its ViT with "
            "judge='features' (--judge features), and apply the method that is found to it"
        )
    if not isinstance(model, ReducedViT):
        return model, None
    return model.vit, model.reducer if model.reducer.name != "dense" else None


def _folder(out: str | os.PathLike[str] | None, name: str) -> Path:
    """Return the folder of the result; raise ValueError if it has files in it."""
    folder = Path("runs", f"tune-{name}") if out is None else Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name another folder (out, --out)")
    return folder


def _learn(price: Price, backbone: Backbone, found: Sequence[Template], told: Progress) -> bool:
    """Measure each method's own work at a constant rate; return whether any rate meets the goal."""
    pairs = [(one, recall) for one in found for recall in (one.recalls[0], one.recalls[-1])]
    solved = [solve(one, None, recall, price) for one, recall in dict.fromkeys(pairs)]
    known = [one for one in solved if one is not None]
    price.learn(backbone, known, lambda done, of: told("timing methods", done, of))
    return bool(known)


def _check_reachable(target: str, found: Sequence[Template], price: Price) -> None:
    best = cheapest(found, price)
    if best.price > price.goal:
        raise ValueError(
            f"no schedule meets the target {target!r}, which allows {price.said(price.goal)}: the "
            f"fastest one, {best.method}, takes {price.said(best.price)}"
        )


# The table ---------------------------------------------------------------------------------------


class _Table:
    """Collects the rows of the result."""

    def __init__(self, judge: Judge, price: Price, backbone: Backbone, told: Progress) -> None:
        self.judge, self.price, self.backbone, self.told = judge, price, backbone, told
        self.roles: list[tuple[str, Scored]] = []
        self.timings: dict[str, Timings] = {}

    @property
    def choice(self) -> Scored:
        """The chosen candidate."""
        return next(one for role, one in self.roles if role == "choice")

    def _at_target(self) -> list[Scored]:
        return [one for role, one in self.roles if role != "frontier"]

    def add(self, found: Found) -> None:
        """Add what a search found, and the same schedules at other speeds."""
        self.roles = [("choice", found.best[0])]
        # A constant rate with recall is a schedule too.
        self.roles += [("schedule", one) for one in found.best[1:] if one not in found.constants]
        self.roles += [("constant", one) for one in found.constants if one is not found.best[0]]
        saved = self.price.dense - self.price.goal
        for done, one in enumerate(found.best):
            self.told("other speeds", done, len(found.best))
            for share in _SAVINGS:
                goal, was = self.price.dense - share * saved, one.candidate
                other = solve(was.template, was.curve, was.recall, self.price, goal)
                if other is not None and other.method != was.method:
                    self.roles.append(("frontier", Scored.of(other, self.judge)))
        for done, (_, one) in enumerate(self.roles):
            self.told("images that report", done, len(self.roles))
            one.on(self.judge.pictures.reporting)

    # Timing --------------------------------------------------------------------------------------

    def time(self, rounds: int, target: str) -> list[str]:
        """Time what meets the target beside the dense model; correct a choice that misses it.

        Return notes about it.
        """
        price = self.price
        self._measure(self._at_target(), rounds)
        if not isinstance(price, Times):
            return []
        first = self.choice
        for _ in range(_AGAIN):
            if self._missed() <= _NEAR or not self._correct():
                break
            self._measure([self.choice], rounds)
        self._price_anew()
        # At another rate it agrees less than where it was chosen.
        changed = self.choice is not first
        notes = self._fall_back(target) if changed or self._over(first) > _PROMISE else []
        missed, (ms, dense) = self._missed(), self._ms(self.choice)
        if missed <= _PROMISE or notes:
            return notes
        return [
            f"the choice was timed at {ms:.3g} ms beside {dense:.3g} of the dense model, "
            f"{missed:.0%} off the target {target!r}: the machine may be busy with other work"
        ]

    def _fall_back(self, target: str) -> list[str]:
        """Replace the choice by the best that is fast enough, if that is another; return a note."""
        was = self.choice
        timed = [one for role, one in self.roles if one.candidate.method in self.timings]
        quick = [one for one in timed if self._over(one) <= _PROMISE]
        if not quick:
            return []
        choosing = self.judge.pictures.choosing
        best = min(quick, key=lambda one: one.on(choosing).distance)
        if best is was:
            return []
        others = [(role, one) for role, one in self.roles[1:] if one is not best]
        self.roles = [("choice", best), ("schedule", was), *others]
        (ms, dense), method = self._ms(was), was.candidate.method
        if self._over(was) > _PROMISE:
            return [
                f"{method} agreed better, but was timed at {ms:.3g} ms beside {dense:.3g} of the "
                f"dense model and could not be made to meet {target!r}"
            ]
        return [
            f"{was.candidate.reducer.name} agreed best at the rate that was predicted to meet "
            f"{target!r}; at the one that meets it, {method}, it agrees less than the choice"
        ]

    def measured(self, rounds: int) -> str | None:
        """Describe how times were measured; None if nothing was timed."""
        trial = " (a trial)" * (rounds < LEAST_ROUNDS)
        return f"{rounds} interleaved rounds{trial}, {self._setting()}" if rounds else None

    def speed(self, rounds: int) -> dict[str, Any]:
        """Return how fast the choice was timed, as the record of a model keeps it."""
        method, setting = self.choice.candidate.method, self._setting()
        timings = self.timings[method]
        ratio = timings.ratio(method, DENSE)
        return {
            "metric": "speed",
            "batch": setting.batch,
            "times": round(ratio.median, 4),
            "low": round(ratio.low, 4),
            "high": round(ratio.high, 4),
            "per_second": round(1000 * setting.batch / timings.ms(method).median, 4),
            "rounds": rounds,
            "precision": setting.dtype,
        }

    def _setting(self) -> Setting:
        if isinstance(self.price, Times):
            return self.price.table.setting
        return setting_of(self.backbone)

    def _measure(self, some: Sequence[Scored], rounds: int) -> None:
        timings = beside_dense(
            self.backbone,
            {one.candidate.method: one.candidate.reducer for one in some},
            self._setting(),
            rounds=rounds,
            progress=lambda done, of: self.told("timing finalists", done, of),
        )
        self.timings |= {one.candidate.method: timings for one in some}

    def _ms(self, one: Scored) -> tuple[float, float]:
        """Return measured milliseconds of a candidate and of the dense model beside it.

        Ratios compare pairs of the same round, which a busy machine slows alike.
        """
        timings = self.timings[one.candidate.method]
        dense = timings.ms(DENSE).median
        return dense / timings.ratio(one.candidate.method, DENSE).median, dense

    def _goal(self, one: Scored) -> float:
        """Return the milliseconds that a candidate may take, at the machine's speed of that run."""
        assert isinstance(self.price, Times)
        return self.price.wanted.goal(self._ms(one)[1])

    def _over(self, one: Scored) -> float:
        """Return by what share a candidate exceeds its goal; negative if it is faster."""
        return self._ms(one)[0] / self._goal(one) - 1

    def _missed(self) -> float:
        return abs(self._over(self.choice))

    def _correct(self) -> bool:
        """Solve the choice again, with its measured time; return whether it has changed."""
        price = self.price
        assert isinstance(price, Times)
        (ms, dense), goal = self._ms(self.choice), self._goal(self.choice)
        was = self.choice.candidate
        scale = dense / price.dense
        price.correct(was, ms / scale)
        now = solve(was.template, was.curve, was.recall, price, goal / scale)
        if now is None or now.method == was.method:
            return False
        other = Scored.of(now, self.judge)
        self.roles[0] = ("choice", other)
        other.on(self.judge.pictures.reporting)
        return True

    def _price_anew(self) -> None:
        """Price schedules at other speeds again, with the own work that was timed at the target.

        On the frontier they stand beside times that were measured.
        """
        price = self.price
        assert isinstance(price, Times)
        elsewhere = [one for role, one in self.roles if role == "frontier"]
        for one in self._at_target():
            ms, dense = self._ms(one)
            price.correct(one.candidate, ms * price.dense / dense)
            for other in elsewhere:
                was = other.candidate
                if was.shape == one.candidate.shape:
                    paid, _ = price.of(was.template, was.reducer)
                    other.candidate = replace(was, price=paid)

    # In the end ----------------------------------------------------------------------------------

    def doubts(self) -> list[str]:
        """Return a note if the reporting half would have chosen another that is fast enough."""
        half = self.judge.pictures.reporting
        timed = isinstance(self.price, Times) and bool(self.timings)
        quick = [one for one in self._at_target() if not timed or self._over(one) <= _PROMISE]
        best = min([self.choice, *quick], key=lambda one: one.on(half).distance)
        low, own = best.on(half).distance, self.choice.on(half).distance
        if low >= own:
            return []
        return [
            f"on the images that report, {best.candidate.method} agrees better than the choice: "
            f"its distance from the dense model is {low:.3g} instead of {own:.3g}"
        ]

    def frame(self) -> pd.DataFrame:
        """Return all rows; on the frontier are those that no row beats in speed and agreement."""
        rows = [self._dense(), *(self._row(role, one) for role, one in self.roles)]
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        pairs = list(zip(speeds(table), table["reporting"], strict=True))
        table["frontier"] = [
            not any(x >= speed * _ALIKE and y < distance for x, y in pairs)
            for speed, distance in pairs
        ]
        return table

    def _dense(self) -> dict[str, Any]:
        spec, same = self.backbone.spec, 1.0 if self.judge.kind == "classes" else math.nan
        times = isinstance(self.price, Times)
        return {
            "role": "dense",
            "method": "dense",
            "schedule": "",
            "options": "",
            "tokens": [spec.prefix + spec.grid[0] * spec.grid[1]] * spec.depth,
            "macs": count_costs(self.backbone.model).macs,
            "predicted_ms": self.price.dense if times else math.nan,
            "predicted": 1.0,
            "choosing": 0.0,
            "reporting": 0.0,
            "same_choosing": same,
            "same_reporting": same,
        }

    def _row(self, role: str, one: Scored) -> dict[str, Any]:
        candidate, pictures = one.candidate, self.judge.pictures
        # A schedule at another speed is compared on the reporting images only.
        choosing = None if role == "frontier" else one.on(pictures.choosing)
        reporting = one.on(pictures.reporting)
        found = {
            "role": role,
            "method": candidate.template.label,
            "options": candidate.method,
            "schedule": candidate.schedule,
            "tokens": candidate.tokens,
            "macs": count_costs(one.model).macs,
            "predicted": self.price.times(candidate.price),
            "choosing": math.nan if choosing is None else choosing.distance,
            "same_choosing": None if choosing is None else choosing.same,
            "reporting": reporting.distance,
            "same_reporting": reporting.same,
        }
        if isinstance(self.price, Times):
            found["predicted_ms"] = candidate.price
        timings = self.timings.get(candidate.method)
        if timings is not None:
            ratio = timings.ratio(candidate.method, DENSE)
            found |= {"measured": ratio.median, "measured_low": ratio.low}
            found |= {"measured_high": ratio.high, "measured_ms": self._ms(one)[0]}
        return found


# In words ----------------------------------------------------------------------------------------


def _predicted(price: Price) -> str:
    if isinstance(price, Times):
        return f"from the latency table ({price.table.setting})"
    return "counted"


def _left_out(reasons: dict[str, str]) -> list[str]:
    """Return notes on the methods that were left out, one for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    return [f"left out {', '.join(names)}: {why}" for why, names in by_reason.items()]


def _unmet(searched: Sequence[Template], found: Found) -> list[str]:
    """Return notes on the methods that do not meet the target, at a constant rate or at all."""
    constant = {one.candidate.template for one in found.constants}
    met = {one.candidate.template for one in found.best}
    never = [one.label for one in searched if one not in met]
    late = [one.label for one in searched if one in met - constant]
    said = [f"no schedule of {', '.join(never)} meets the target"] * bool(never)
    return said + [f"no constant rate of {', '.join(late)} meets the target"] * bool(late)


def _chance(searched: Sequence[Template], chosen: Candidate) -> list[str]:
    """Return a note if the control was chosen though there were methods."""
    if chosen.reducer.name != RANDOM or all(one.reducer.name == RANDOM for one in searched):
        return []
    return [
        "the choice is random, the control: on the images that choose, no method that meets the "
        "target agrees better than dropping patches by chance"
    ]


def _commands(
    folder: Path, images: Tensor | Paths, backbone: Backbone, chosen: Candidate
) -> list[str]:
    """Return the commands that would raise the agreement, or the accuracy, by training."""
    where = "FOLDER"
    if isinstance(images, str | os.PathLike):
        where = quote(os.fspath(images))
    found = [f"foveate adapt {quote(str(folder))} --images {where}    # without labels"]
    if backbone.classifies:
        small = backbone.channels == 1 and backbone.spec.patch == (4, 4)
        recipe = "fashion_part_dynamicvit" if small else "imagenet_deit_s_evit model.name=null"
        found.append(
            f"foveate reduce {recipe} {quote(f'model.start={folder}')} "
            f'"method={chosen.method}" data.train=folder:LABELLED    # with labels'
        )
    return found
