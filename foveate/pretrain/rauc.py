"""How much earlier one pre-training run gets good than another: RAUC and epochs to match.

Equation 6 of the paper on masked token optimisation, with S1 the score of the base run:

    RAUC(S1, S2; E1, E2) = int (S2(E) - S1(E1)) dE / int (S1(E) - S1(E1)) dE,  both from E1 to E2

The same constant S1(E1) is taken off both, so that a head start of the other run counts, and 1.44
means 44 % more than what the base *gains* over the range, not 44 % more accuracy. Numbers in the
paper's Table 2 do not follow from the accuracies beside them; the equation is what is done here.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.evaluate.convergence import read_metric
from foveate.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "METRIC",
    "PROTOCOL",
    "Efficiency",
    "Pair",
    "Run",
    "compare",
    "curve",
    "epochs_to_match",
    "figure",
    "rauc",
    "write",
]

METRIC = "probe/linear"
PROTOCOL = "compare checkpoints inside one schedule; a run annealed earlier is another experiment"

_LEAST = 3  # with two points, RAUC is the ratio of two straight lines
_FLAT = 1e-9  # of the scores: a mean gain that is nothing but rounding
_Points = list[tuple[float, float]]


# Curves ------------------------------------------------------------------------------------------


def rauc(
    base: Mapping[float, float],
    other: Mapping[float, float],
    start: float,
    end: float,
    *,
    offset: float | None = None,
) -> float:
    """Relative area under the curve of ``other``, with straight lines between the points.

    Above 1 ``other`` is ahead of ``base``. Adding a number to both curves or multiplying both by a
    positive one changes nothing; changing places does.

    Args:
        base: score by epoch, at least two points; higher is better.
        other: likewise.
        start: first epoch of the range, which must lie inside both curves.
        end: its last epoch.
        offset: taken off both curves instead of the base's score at ``start``.

    Returns:
        The ratio; nan, with a warning, where the base gains nothing over the range.
    """
    if not start < end:
        raise ValueError(f"the range must begin before it ends, got {start:g} to {end:g}")
    ours, theirs = _points(base, "base"), _points(other, "other")
    for name, points in (("base", ours), ("other", theirs)):
        _inside(points, name, start, end)
    floor = _at(ours, start) if offset is None else offset
    # All corners of both curves: between them both are straight and the trapezoids are exact.
    corners = {epoch for epoch, _ in (*ours, *theirs) if start < epoch < end}
    epochs = sorted({start, end, *corners})
    below, above = (_area(points, epochs, floor) for points in (ours, theirs))
    size = max(abs(floor), *(abs(_at(ours, epoch)) for epoch in epochs))
    if below <= _FLAT * size * (end - start):
        warnings.warn(
            f"RAUC is nan: the base gains nothing from epoch {start:g} to {end:g}", stacklevel=2
        )
        return math.nan
    return above / below


def epochs_to_match(
    base: Mapping[float, float], reference_epoch: float, other: Mapping[float, float]
) -> float | None:
    """First epoch at which ``other`` is as good as ``base`` at a reference epoch.

    The share of pre-training that it saves is ``1 - epoch / reference_epoch``.

    Args:
        base: score by epoch, at least two points; higher is better.
        reference_epoch: inside the curve of ``base``.
        other: score by epoch; a first point that is good enough already is the answer.

    Returns:
        The epoch, between points on a straight line; None if ``other`` is never as good.
    """
    ours = _points(base, "base")
    _inside(ours, "base", reference_epoch)
    goal, points = _at(ours, reference_epoch), _points(other, "other")
    if points[0][1] >= goal:
        return points[0][0]
    for (before, low), (after, high) in itertools.pairwise(points):
        if high >= goal:
            return before + (after - before) * (goal - low) / (high - low)
    return None


def curve(run: Path, metric: str = METRIC, *, least: int = _LEAST) -> dict[float, float]:
    """Score of a pre-training run by the epochs that it was trained for.

    Args:
        run: the folder of a run, or a CSV file with a column "epoch" and one of the metric's name.
            In what training writes, which has a column "step", epochs are counted from 0 and
            scored at their end; in any other file they are epochs of training as they stand.
        metric: "probe/linear", "probe/knn", "val/loss" or another column.
        least: scored checkpoints that there must be.
    """
    run = Path(run)
    path = run / "metrics.csv" if run.is_dir() else run
    columns: list[str] = []
    if path.is_file():  # read_metric says what is missing or broken
        with path.open(encoding="utf-8", errors="replace") as file:
            columns = file.readline().strip().split(",")
    if run.is_dir() and columns and metric.startswith("probe/") and metric not in columns:
        raise ValueError(
            f"{run} was never scored by {metric}: pre-train with probe.data=... and probe.every=..."
        )
    found = read_metric(run, metric)
    scores = {epoch + ("step" in columns): score for epoch, score in found.items()}
    for epoch, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"{path}: {metric} is {score} at epoch {epoch:g}, expected a number")
    if len(scores) < least:
        raise ValueError(
            f"{run} holds {_counted(len(scores), 'scored checkpoint')}; RAUC needs at least "
            f"{least}: pre-train with probe.every=..., or read its snapshots with foveate probe, "
            "feature and lr as in the runs, into a CSV file of one's own"
        )
    return scores


def _points(scores: Mapping[float, float], name: str) -> _Points:
    if len(scores) < 2:
        raise ValueError(f"the curve {name} needs at least 2 points, got {len(scores)}")
    return sorted(scores.items())


def _inside(points: _Points, name: str, *epochs: float) -> None:
    """Refuse to extend a curve beyond its ends."""
    first, last = points[0][0], points[-1][0]
    for epoch in epochs:
        if not first <= epoch <= last:
            raise ValueError(
                f"epoch {epoch:g} lies outside the curve {name}, which covers epochs {first:g} to "
                f"{last:g}"
            )


def _at(points: _Points, epoch: float) -> float:
    """Score at an epoch inside the curve; exactly that of a point where there is one."""
    place = bisect_left(points, (epoch, -math.inf))
    after, high = points[place]
    if after == epoch:
        return high
    before, low = points[place - 1]
    return low + (high - low) * (epoch - before) / (after - before)


def _area(points: _Points, epochs: Sequence[float], floor: float) -> float:
    heights = [_at(points, epoch) - floor for epoch in epochs]
    steps = zip(itertools.pairwise(epochs), itertools.pairwise(heights), strict=True)
    return math.fsum((e1 - e0) * (h0 + h1) / 2 for (e0, e1), (h0, h1) in steps)


# Runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that was scored while it went on.

    Attributes:
        name: for tables and pictures.
        scores: by epochs of training, as they were logged.
        epochs: of its schedule; None where no recipe says so.
    """

    name: str
    scores: Mapping[float, float]
    epochs: int | None = None


@dataclass(frozen=True)
class Pair:
    """Two curves against each other.

    Attributes:
        base, other: what they are called.
        base_start, base_end: scores of the base at both ends of the range.
        other_start, other_end: scores of the other run there.
        rauc: above 1 the other run is ahead; nan where the base gains nothing.
        goal: score of the base at the reference epoch.
        match: epoch at which the other run is as good; None if it never is, or ``rauc`` is nan.
        reduction: share of the reference epoch that it saves; None without ``match``.
        at_once: ``match`` is the first score there is: it may have been as good before.
    """

    base: str
    other: str
    base_start: float
    base_end: float
    other_start: float
    other_end: float
    rauc: float
    goal: float
    match: float | None
    reduction: float | None
    at_once: bool


@dataclass(frozen=True)
class Efficiency:
    """What a comparison of runs found.

    Attributes:
        metric: what was scored.
        start, end: the range of epochs.
        at: reference epoch of epochs to match.
        base, other: runs, seed by seed.
        pairs: seed i of the base against seed i of the other.
        mean: the means of the curves against each other.
        warnings: what makes the numbers doubtful.
    """

    metric: str
    start: float
    end: float
    at: float
    base: list[Run]
    other: list[Run]
    pairs: list[Pair]
    mean: Pair
    warnings: list[str] = field(default_factory=list)

    def over_seeds(self, name: str) -> tuple[float | None, float | None, int]:
        """Mean, standard deviation of a sample, and number of pairs that have the quantity."""
        found = [getattr(pair, name) for pair in self.pairs]
        known = [value for value in found if value is not None and math.isfinite(value)]
        return (
            statistics.fmean(known) if known else None,
            statistics.stdev(known) if len(known) > 1 else None,
            len(known),
        )

    def json(self) -> dict[str, Any]:
        """Everything, for a file; what is undefined is null."""
        seeds = {}
        for name in ("rauc", "match", "reduction"):
            mean, std, n = self.over_seeds(name)
            seeds[name] = {"mean": mean, "std": std, "n": n}
        runs = {
            side: [{**asdict(run), "scores": sorted(run.scores.items())} for run in given]
            for side, given in (("base", self.base), ("other", self.other))
        }
        about = {
            "metric": self.metric,
            "lower_is_better": _sign(self.metric) < 0,
            "from": self.start,
            "to": self.end,
            "at": self.at,
            "note": PROTOCOL,
            "warnings": self.warnings,
        }
        pairs = [_defined(pair) for pair in self.pairs]
        return {**about, **runs, "pairs": pairs, "seeds": seeds, "mean_curves": _defined(self.mean)}


def compare(
    base: Sequence[Path],
    other: Sequence[Path],
    *,
    metric: str = METRIC,
    start: float | None = None,
    end: float | None = None,
    at: float | None = None,
) -> Efficiency:
    """Compare pre-training runs, seed i of the one kind with seed i of the other.

    A metric whose name ends in "loss" is better where it is lower: its sign is changed for RAUC,
    and matching it means to come down to it.

    Args:
        base: runs as ``curve`` takes them, one a seed.
        other: as many.
        metric: what they were scored by.
        start, end: range of epochs (all that the runs share).
        at: reference epoch of epochs to match (the last that all base runs have).
    """
    if not base or len(base) != len(other):
        raise ValueError(
            f"seed i of the base is compared with seed i of the other: expected as many runs of "
            f"both, got {len(base)} and {len(other)}"
        )
    ours, theirs = _opened(base, other, metric), _opened(other, base, metric)
    curves = {run.name: _points(run.scores, run.name) for run in (*ours, *theirs)}
    first, last = _shared(curves.values())
    if not first < last:
        spans = ", ".join(f"{name} {p[0][0]:g} to {p[-1][0]:g}" for name, p in curves.items())
        raise ValueError(f"the runs share no range of epochs: {spans}")
    start, end = first if start is None else start, last if end is None else end
    at = _shared(curves[run.name] for run in ours)[1] if at is None else at
    for name, points in curves.items():
        _inside(points, name, start, end)
    for run in ours:
        _inside(curves[run.name], run.name, at)
    if at <= 0:
        raise ValueError(f"the reference epoch must lie after the start of training, got {at:g}")
    told = [*_schedules(ours, theirs)]
    pairs = [_pair(one, two, metric, start, end, at) for one, two in zip(ours, theirs, strict=True)]
    told += [
        f"{pair.base} gains nothing from epoch {start:g} to {end:g}: RAUC is undefined"
        for pair in pairs
        if math.isnan(pair.rauc)
    ]
    # Not the mean of the ratios, to which a base that gains little adds a huge one.
    mean = _pair(Run("base", _mean(ours)), Run("other", _mean(theirs)), metric, start, end, at)
    return Efficiency(metric, start, end, at, ours, theirs, pairs, mean, told)


def write(found: Efficiency, folder: Path, *, command: str = "") -> list[Path]:
    """Write rauc.json and the picture into a folder, and name what was written."""
    from foveate.evaluate.style import save

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"rauc{kind}" for kind in (".json", ".svg", ".png")]
    text = json.dumps({"format": 1, "command": command, **found.json()}, indent=1, allow_nan=False)
    write_text(written[0], text + "\n")
    drawn = figure(found)
    for path in written[1:]:
        save(drawn, path)
    return written


def _opened(runs: Sequence[Path], opposite: Sequence[Path], metric: str) -> list[Run]:
    """Read runs; one is called by its folder, or its whole path where that says too little."""
    names = [Path(run).name for run in (*runs, *opposite)]
    found = []
    for run in map(Path, runs):
        name = run.name if run.name and names.count(run.name) == 1 else str(run)
        found.append(Run(name, curve(run, metric), _epochs(run)))
    return found


def _epochs(run: Path) -> int | None:
    """Epochs of the schedule, from the recipe of a run."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        import yaml
    except ImportError:  # it comes with foveate[train]
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return int(tree["loop"]["epochs"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no recipe of a run: expected a number loop.epochs") from None


def _schedules(ours: Sequence[Run], theirs: Sequence[Run]) -> Iterable[str]:
    if len({run.epochs for run in (*ours, *theirs)} - {None}) > 1:
        lengths = ", ".join(f"{run.name} {run.epochs}" for run in (*ours, *theirs) if run.epochs)
        yield (
            f"loop.epochs differ ({lengths}): separately annealed schedules; a different experiment"
        )


def _shared(curves: Iterable[_Points]) -> tuple[float, float]:
    ends = [(points[0][0], points[-1][0]) for points in curves]
    return max(first for first, _ in ends), min(last for _, last in ends)


def _pair(one: Run, two: Run, metric: str, start: float, end: float, at: float) -> Pair:
    sign = _sign(metric)
    ours, theirs = (
        {epoch: sign * score for epoch, score in run.scores.items()} for run in (one, two)
    )
    with warnings.catch_warnings():  # compare says it, with the name of the run
        warnings.simplefilter("ignore")
        ratio = rauc(ours, theirs, start, end)
    # To be as good as a run that gains nothing is no feat.
    match = None if math.isnan(ratio) else epochs_to_match(ours, at, theirs)
    mine, its = sorted(one.scores.items()), sorted(two.scores.items())
    return Pair(
        one.name,
        two.name,
        _at(mine, start),
        _at(mine, end),
        _at(its, start),
        _at(its, end),
        ratio,
        _at(mine, at),
        match,
        None if match is None else 1 - match / at,
        match == its[0][0],
    )


def _mean(runs: Sequence[Run]) -> dict[float, float]:
    """Mean of curves where all of them are, at every corner of any."""
    return {epoch: statistics.fmean(scores) for epoch, scores in _across(runs)}


def _across(runs: Sequence[Run]) -> Iterable[tuple[float, list[float]]]:
    """Scores of all runs at each epoch of any of them that lies inside all."""
    curves = [_points(run.scores, run.name) for run in runs]
    first, last = _shared(curves)
    for epoch in sorted({epoch for points in curves for epoch, _ in points}):
        if first <= epoch <= last:
            yield epoch, [_at(points, epoch) for points in curves]


def _sign(metric: str) -> int:
    return -1 if metric.endswith("loss") else 1


def _defined(pair: Pair) -> dict[str, Any]:
    """JSON has no nan."""
    return {**asdict(pair), "rauc": None if math.isnan(pair.rauc) else pair.rauc}


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# Picture -----------------------------------------------------------------------------------------


def figure(found: Efficiency) -> Figure:
    """Both curves, the areas over the range, and how much earlier the other run is as good.

    With several seeds the curves are means, with a band of the standard deviation.
    """
    from matplotlib.colors import to_rgb

    from foveate.evaluate.figures import Line, lines_figure
    from foveate.evaluate.style import QUIET, look

    lines = []
    for side in (found.base, found.other):
        epochs, scores = zip(*_across(side), strict=True)
        means = tuple(map(statistics.fmean, scores))
        if len(side) == 1:
            lines.append(Line(side[0].name, epochs, means))
            continue
        pairs = [(m, statistics.stdev(own)) for m, own in zip(means, scores, strict=True)]
        low, high = tuple(m - s for m, s in pairs), tuple(m + s for m, s in pairs)
        lines.append(Line(f"{side[0].name} (n {len(side)})", epochs, means, low, high))
    several = "\nband: standard deviation over seeds" if len(found.base) > 1 else ""
    up = found.metric + ", %" * found.metric.startswith("probe/")
    drawn = lines_figure(lines, across=f"epochs of pre-training{several}", up=up)
    axes, mean = drawn.axes[0], found.mean
    axes.axvspan(found.start, found.end, color=QUIET, alpha=0.06, linewidth=0, zorder=0)
    # The lesser area covers the greater one: what stands out beyond it is the lead.
    for number in (1, 0) if not mean.rauc < 1 else (0, 1):
        points = list(zip(lines[number].x, lines[number].y, strict=True))
        inner = [epoch for epoch, _ in points if found.start < epoch < found.end]
        within = [found.start, *inner, found.end]
        heights = [_at(points, epoch) for epoch in within]
        light = [0.8 + 0.2 * part for part in to_rgb(look(number)["color"])]
        axes.fill_between(within, heights, mean.base_start, color=light, linewidth=0, zorder=0.8)
    level = [mean.base_start] * 2
    axes.plot([found.start, found.end], level, color=QUIET, linewidth=0.8, linestyle=":")
    words = "undefined" if math.isnan(mean.rauc) else f"{mean.rauc:.2f}"
    axes.text(
        (found.start + found.end) / 2,
        1.01,
        f"RAUC {words}",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize="small",
    )
    if mean.match is not None and mean.reduction is not None:
        goal, up_or_down = [mean.goal] * 2, _sign(found.metric)
        axes.plot([found.at, mean.match], goal, color="black", linewidth=1, linestyle="--")
        axes.plot([mean.match], goal[:1], "o", color="black", markersize=7, fillstyle="none")
        axes.annotate(
            ("at least " if mean.at_once and mean.reduction >= 0 else "")
            + f"{abs(mean.reduction):.0%} {'fewer' if mean.reduction >= 0 else 'more'} epochs",
            (mean.match + 0.6 * (found.at - mean.match), mean.goal),
            xytext=(0, 3 * up_or_down),  # on the side where the other run's curve goes away
            textcoords="offset points",
            ha="center",
            va="bottom" if up_or_down > 0 else "top",
            fontsize=8,
        )
    return drawn
