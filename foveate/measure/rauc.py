"""How much earlier one pre-training run gets good than another: RAUC and epochs to match.

Equation 6 of the paper on masked token optimisation, with S1 the score of the base run:

    RAUC(S1, S2; E1, E2) = int (S2(E) - S1(E1)) dE / int (S1(E) - S1(E1)) dE,  both from E1 to E2

The same constant S1(E1) is taken off both, so that a head start of the other run counts, and 1.44
means 44 % more than what the base *gains* over the range, not 44 % more accuracy. Numbers in the
paper's Table 2 do not follow from the accuracies beside them; this module computes the equation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate import config
from foveate.core.schedule import check_choice
from foveate.measure.curves import by_seconds, curve, seconds
from foveate.measure.figures import lines_figure
from foveate.measure.sheets import Sheet
from foveate.measure.style import QUIET, line_look
from foveate.measure.table import Results, formatted, frame, grid, pd, rows, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    *("EPOCHS", "METRIC", "SECONDS", "compare", "epochs_to_match", "figure", "over_runs", "rauc"),
    "sheet",
]

METRIC = "probe/linear"
EPOCHS, SECONDS = "epochs", "seconds"  # what curves are over
PROTOCOL = "Compare checkpoints inside one schedule: a run annealed earlier is another experiment."
MEAN = "means of the curves"
_LEAST = 3  # with two points, RAUC is the ratio of two straight lines
_FLAT = 1e-9  # a mean gain, relative to the scores, below which it is rounding

Scores = Mapping[float, float]


# Two curves --------------------------------------------------------------------------------------


def rauc(
    base: Scores, other: Scores, start: float | None = None, end: float | None = None
) -> float:
    """Return the relative area under the curve of ``other``, with straight lines between points.

    Above 1 ``other`` is ahead of ``base``. Adding a number to both curves, or multiplying both by a
    positive number, does not change it; exchanging the curves does. It raises ValueError where it
    has no meaning: for a single point, curves that share no range, or a base that gains nothing
    over the range.

    Args:
        base: score by epoch, higher is better.
        other: score by epoch of the other run.
        start: first epoch of the range, inside both curves; None is the first epoch that both have.
        end: last epoch of the range; None is the last epoch that both have.
    """
    start, end = _range({"base": base, "other": other}, start, end)
    corners = {epoch for epoch in (*base, *other) if start < epoch < end}
    # Between the corners of both curves both are straight, so the trapezoids are exact.
    epochs = np.array(sorted({start, end, *corners}))
    ours, theirs = _at(base, epochs), _at(other, epochs)
    below, above = (_area(epochs, scores - ours[0]) for scores in (ours, theirs))
    if below <= _FLAT * np.abs(ours).max() * (end - start):
        raise ValueError(f"the base gains nothing from {start:g} to {end:g}, so RAUC is undefined")
    return above / below


def epochs_to_match(base: Scores, reference: float, other: Scores) -> float | None:
    """Return the first epoch at which ``other`` is as good as ``base`` at a reference epoch.

    The share of pre-training that it saves is ``1 - epoch / reference``. It lies between points on
    a straight line; None if ``other`` is never as good.

    Args:
        base: score by epoch, higher is better.
        reference: an epoch inside the curve of ``base``.
        other: score by epoch; a first point that is good enough already is the answer.
    """
    _inside("base", base, reference)
    goal = float(_at(base, reference))
    epochs, scores = _points(other)
    reached = np.flatnonzero(scores >= goal)
    if not len(reached):
        return None
    place = int(reached[0])
    if place == 0:
        return float(epochs[0])
    before = slice(place - 1, place + 1)  # its score rises between these two
    return float(np.interp(goal, scores[before], epochs[before]))


def _points(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    epochs = np.array(sorted(scores), dtype=float)
    return epochs, np.array([scores[epoch] for epoch in sorted(scores)], dtype=float)


def _at(scores: Scores, epoch: Any) -> Any:
    return np.interp(epoch, *_points(scores))


def _area(epochs: np.ndarray, heights: np.ndarray) -> float:
    # np.trapezoid, which numpy has since 2.0 only.
    return float(np.diff(epochs) @ (heights[1:] + heights[:-1]) / 2)


def _range(
    curves: Mapping[str, Scores], start: float | None, end: float | None
) -> tuple[float, float]:
    """Return the range of epochs that all curves share, or a given one inside it."""
    for name, scores in curves.items():
        if len(scores) < 2:
            raise ValueError(f"the curve {name} needs at least 2 points, got {len(scores)}")
    first = max(min(scores) for scores in curves.values())
    last = min(max(scores) for scores in curves.values())
    if not first < last:
        spans = ", ".join(f"{name} {min(s):g} to {max(s):g}" for name, s in curves.items())
        raise ValueError(f"the runs share no range: {spans}")
    start, end = first if start is None else start, last if end is None else end
    if not start < end:
        raise ValueError(f"the range must begin before it ends, got {start:g} to {end:g}")
    for name, scores in curves.items():
        _inside(name, scores, start, end)
    return start, end


def _inside(name: str, scores: Scores, *epochs: float) -> None:
    """Refuse to extend a curve beyond its ends."""
    first, last = min(scores), max(scores)
    for epoch in epochs:
        if not first <= epoch <= last:
            raise ValueError(
                f"{epoch:g} lies outside the curve {name}, which goes from {first:g} to {last:g}"
            )


# Runs --------------------------------------------------------------------------------------------


def compare(
    base: Sequence[Path],
    other: Sequence[Path],
    *,
    metric: str = METRIC,
    start: float | None = None,
    end: float | None = None,
    at: float | None = None,
    over: str = EPOCHS,
) -> Results:
    """Compare pre-training runs of two kinds, seed i of one with seed i of the other.

    The part "rauc" has a row for each pair and metric: base_start, base_end, other_start,
    other_end, rauc, goal, match, saved, and at_once if the other run is as good at its first score.
    The last rows belong to the mean curves. The part "curve" has the scores.

    A metric whose name ends in "loss" is better where it is lower: its sign is changed for RAUC,
    and matching it means falling to it.

    Args:
        base: folders of runs, or CSV files, one a seed.
        other: as many.
        metric: what they were scored by, a column of their metrics.
        start, end: range of epochs (all that the runs share).
        at: reference epoch of epochs to match (the last that all base runs have).
        over: "epochs", or "seconds" of training in their place.
    """
    check_choice("over", over, (EPOCHS, SECONDS))
    if not base or len(base) != len(other):
        raise ValueError(
            f"seed i of the base is compared with seed i of the other: expected as many runs of "
            f"both, got {len(base)} and {len(other)}"
        )
    every = [*base, *other]
    names = [
        run.name if [r.name for r in every].count(run.name) == 1 else str(run) for run in every
    ]
    curves = [_scored(run, metric, over) for run in every]
    n = len(base)
    start, end = _range(dict(zip(names, curves, strict=True)), start, end)
    at = min(max(scores) for scores in curves[:n]) if at is None else at
    for name, scores in zip(names[:n], curves[:n], strict=True):
        _inside(name, scores, at)
    if at <= 0:
        raise ValueError(f"the reference must lie after the start of training, got {at:g}")
    notes = [*_differences(names, every)]
    sides = [dict(enumerate(side)) for side in (curves[:n], curves[n:])]
    values, refusals = over_runs(sides[0], sides[1], metric, start, end, at)
    runs = {None: MEAN} | {seed: f"{names[n + seed]} over {names[seed]}" for seed in sides[0]}
    if all(seed in refusals for seed in sides[0]):
        raise ValueError(f"{runs[0]}: {refusals[0]}")
    notes += [f"{runs[seed]}: {text}." for seed, text in refusals.items()]
    found: list[dict[str, Any]] = []
    for seed, known in values.items():
        found += rows("rauc", known, run=runs[seed], method=metric, seed=seed)
    for place, (name, scores) in enumerate(zip(names, curves, strict=True)):
        shared = {"method": "base" if place < n else "other", "seed": place % n}
        for epoch, score in scores.items():
            found += rows("curve", {metric: score}, run=name, at=epoch, **shared)
    about = {"metric": metric, "lower_is_better": _sign(metric) < 0, "over": over}
    about |= {"from": start, "to": end, "at": at, "notes": [PROTOCOL, *notes]}
    return Results(frame(found), about)


def over_runs(
    base: Mapping[int, Scores],
    other: Mapping[int, Scores],
    metric: str,
    start: float | None = None,
    end: float | None = None,
    at: float | None = None,
) -> tuple[dict[int | None, dict[str, float]], dict[int | None, str]]:
    """Return the RAUC of every seed that both have, and why some seeds have none.

    The seed None stands for the mean curves. Their ratio is not the mean of the ratios, in which a
    base that gains little would add a huge one.

    Args:
        base, other: curves by seed.
        metric: what was scored.
        start, end: range of epochs; None is all that the two curves share.
        at: reference epoch of epochs to match; None is the end of the range.
    """
    seeds = [seed for seed in other if seed in base]
    pairs: dict[int | None, list[Scores]] = {seed: [base[seed], other[seed]] for seed in seeds}
    if seeds:
        pairs[None] = [
            _together([side[seed] for seed in seeds]).mean(axis=1).to_dict()
            for side in (base, other)
        ]
    found: dict[int | None, dict[str, float]] = {seed: {} for seed in pairs}
    refusals: dict[int | None, str] = {}
    for seed, (ours, theirs) in pairs.items():
        values = found[seed]
        try:
            first, last = _range({"base": ours, "other": theirs}, start, end)
            goal = last if at is None else at
            values |= {"base_start": _at(ours, first), "base_end": _at(ours, last)}
            values |= {"other_start": _at(theirs, first), "other_end": _at(theirs, last)}
            values["goal"] = _at(ours, goal)
            before, after = (
                {epoch: _sign(metric) * score for epoch, score in side.items()}
                for side in (ours, theirs)
            )
            values["rauc"] = rauc(before, after, first, last)
            match = epochs_to_match(before, goal, after)
        except ValueError as error:  # matching a run that gains nothing means nothing
            refusals[seed] = str(error)
            continue
        if match is not None:
            values |= {"match": match, "saved": 1 - match / goal}
            values |= {"at_once": 1.0} if match == min(theirs) else {}
    return found, refusals


def _scored(run: Path, metric: str, over: str) -> dict[float, float]:
    """Return the curve of a run; ValueError if it has too few scores."""
    try:
        scores = curve(run, metric)
    except ValueError as error:
        if run.is_dir() and "unknown column" in str(error) and metric.startswith("probe/"):
            raise ValueError(
                f"{run} was never scored by {metric}: pre-train with probe.data=... and "
                "probe.every=..."
            ) from None
        raise
    if len(scores) < _LEAST:
        raise ValueError(
            f"{run} holds {len(scores)} scored checkpoint{'s' * (len(scores) != 1)}; RAUC needs at "
            f"least {_LEAST}: pre-train with probe.every=..., or measure its snapshots with "
            "foveate probe, with the runs' feature and lr, and write a CSV file of the scores"
        )
    return scores if over == EPOCHS else by_seconds(scores, seconds(run))


def _differences(names: Sequence[str], runs: Sequence[Path]) -> Iterator[str]:
    """Refuse runs that were trained or scored on different images; warn of different lengths."""
    settings: dict[str, dict[str, str]] = {"data.train": {}, "probe.data": {}, "loop.epochs": {}}
    for name, run in zip(names, runs, strict=True):
        path = run / "recipe.yaml"
        if not path.is_file():  # a CSV file has none
            continue
        try:
            tree = config.load(path)
            int(tree["loop"]["epochs"])
        except (KeyError, TypeError, ValueError):
            wrong = f"{path} is not the recipe of a run: expected a number loop.epochs"
            raise ValueError(wrong) from None
        for key, found in settings.items():
            group, _, last = key.partition(".")
            if last in tree.get(group, {}):
                found[name] = str(tree[group][last])
    for key, found in settings.items():
        words = ", ".join(f"{name} {value}" for name, value in found.items())
        if len(set(found.values())) > 1 and key != "loop.epochs":
            raise ValueError(f"the runs differ in {key}, so RAUC means nothing: {words}")
        if len(set(found.values())) > 1:
            yield (
                f"Warning: loop.epochs differ ({words}): separately annealed schedules, a "
                "different experiment."
            )


def _together(curves: Sequence[Scores]) -> pd.DataFrame:
    """Return curves as columns over their common range, at every point of any curve."""
    found = pd.DataFrame({number: pd.Series(scores) for number, scores in enumerate(curves)})
    return found.sort_index().interpolate(method="index", limit_area="inside").dropna()


def _sign(metric: str) -> int:
    return -1 if metric.endswith("loss") else 1


# Table and picture -------------------------------------------------------------------------------


def sheet(results: Results) -> Sheet:
    """Return a line for each pair; with several seeds also their mean, and the mean curves'."""
    about = results.about
    found = select(results.table, part="rauc").drop_duplicates(["run", "metric"])
    once = "at_once" in set(found["metric"])
    ends = ("base_start", "base_end", "other_start", "other_end")
    wide = grid(found, "run").reindex(columns=[*ends, "rauc", "match", "saved", "at_once"])
    heads = [f"{side} @{about[end]:g}" for side in ("base", "other") for end in ("from", "to")]
    table = pd.DataFrame({"runs": wide.index}, index=wide.index)
    for head, name in zip(heads, ends, strict=True):
        table[head] = formatted(wide[name], "#.4g")
    # A run that is as good at its first score may have been as good before.
    most, least = (
        wide["at_once"].map({1.0: sign}).astype(object).fillna("") for sign in ("<= ", ">= ")
    )
    table["RAUC"] = formatted(wide["rauc"], ".3f")
    table["matches at"] = most + formatted(wide["match"], ".1f")
    table["saves"] = least + formatted(wide["saved"], ".0%")
    never = table["matches at"].isna() & wide["rauc"].notna()
    table.loc[never, "matches at"] = "never"
    table["saves"] = table["saves"].fillna("")
    table = table.fillna("undefined")
    pairs = wide.drop(index=MEAN)
    if len(pairs) > 1:
        over = pd.DataFrame([[f"mean ± std (n {len(pairs)})", *[""] * 4]], columns=["runs", *heads])
        for head, (name, form) in _FORMS.items():
            over[head] = _over(pairs[name], form)
        table = pd.concat([table.loc[pairs.index], over, table.loc[[MEAN]]])
    else:
        table = table.loc[pairs.index]
    notes = [
        f"Matches at: {about['over']} after which the other run is as good as the base after "
        f"{about['at']:g}."
    ]
    if once:
        notes.append("<=, >=: as good at its first score, and maybe before it.")
    title = f"{about['metric']}, {about['from']:g} to {about['to']:g} {about['over']}"
    spare = (*heads[::2], *heads[1::2])
    return Sheet(title, table, ("runs",), [*notes, *about["notes"]], spare)


_FORMS = {"RAUC": ("rauc", ".3f"), "matches at": ("match", ".1f"), "saves": ("saved", ".0%")}


def _over(values: pd.Series, form: str) -> str:
    """Return mean and standard deviation over the pairs, and their number if some have none."""
    n = values.count()
    if n == 0:
        return ""
    text = format(values.mean(), form) + (f" ± {format(values.std(), form)}" if n > 1 else "")
    return text if n == len(values) else f"{text} ({n} of {len(values)})"


def figure(results: Results) -> Figure:
    """Draw both curves, the areas over the range, and how much earlier the other run is as good.

    With several seeds the curves are means, with a band of the standard deviation.
    """
    from matplotlib.colors import to_rgb

    about, table = results.about, results.table
    start, end, at, metric = (about[name] for name in ("from", "to", "at", "metric"))
    mean = select(table, part="rauc", run=MEAN).set_index("metric")["value"]
    lines = {}
    for side in ("base", "other"):
        own = select(table, part="curve", method=side)
        runs = [dict(zip(g["at"], g["value"], strict=True)) for _, g in own.groupby("seed")]
        curves = _together(runs)
        label = f"{side}: {own['run'].iloc[0]}" + f" (n {len(runs)})" * (len(runs) > 1)
        values = {"at": curves.index, "mean": curves.mean(axis=1), "std": curves.std(axis=1)}
        lines[label] = pd.DataFrame(values)
    several = "\nband: standard deviation over seeds" * (len(runs) > 1)
    up = metric + ", %" * metric.startswith("probe/")
    drawn = lines_figure(lines, across=f"{about['over']} of pre-training{several}", up=up)
    axes, level = drawn.axes[0], mean["base_start"]
    axes.axvspan(start, end, color=QUIET, alpha=0.06, linewidth=0, zorder=0)
    # Draw the smaller area over the larger one: the part that stays visible is the lead.
    for number in (0, 1) if mean.get("rauc", 1) < 1 else (1, 0):
        line = list(lines.values())[number]
        scores = dict(zip(line["at"], line["mean"], strict=True))
        within = [start, *(epoch for epoch in scores if start < epoch < end), end]
        light = [0.8 + 0.2 * part for part in to_rgb(line_look(number)["color"])]
        axes.fill_between(within, _at(scores, within), level, color=light, linewidth=0, zorder=0.8)
    axes.plot([start, end], [level] * 2, color=QUIET, linewidth=0.8, linestyle=":")
    words = f"RAUC {mean['rauc']:.2f}" if "rauc" in mean else "RAUC undefined"
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "bottom"}
    axes.text((start + end) / 2, 1.01, words, ha="center", fontsize="small", **place)
    if "match" in mean:
        match, goal, saved, sign = mean["match"], mean["goal"], mean["saved"], _sign(metric)
        axes.plot([at, match], [goal] * 2, color="black", linewidth=1, linestyle="--")
        axes.plot([match], [goal], "o", color="black", markersize=7, fillstyle="none")
        axes.annotate(
            ("at least " if "at_once" in mean and saved >= 0 else "")
            + f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} {about['over']}",
            (match + 0.6 * (at - match), goal),
            xytext=(0, 3 * sign),  # on the side where the other run's curve goes away
            textcoords="offset points",
            ha="center",
            va="bottom" if sign > 0 else "top",
            fontsize=8,
        )
    return drawn
