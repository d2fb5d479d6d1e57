"""Pictures of a comparison: means over seeds, with bands of their standard deviation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from foveate.compare.numbers import Number
from foveate.compare.results import Results, Subject
from foveate.evaluate.convergence import read_metric
from foveate.evaluate.figures import Line, lines_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures"]

_UP = "top-1 accuracy, %"
_BAND = "band: standard deviation over seeds of training"


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Every picture that there are numbers for, with a name for its file."""
    tradeoff = _tradeoff(results)
    if tradeoff is not None:
        yield "accuracy-macs", tradeoff
    curves = {curve.model: curve for curve in results.curves}
    lines = [_line(name, curve.ratios, curve.top1) for name, curve in curves.items()]
    if any(line.x for line in lines):
        across = f"share of the image's patches dropped at random\n{_BAND}"
        yield "occlusion", _drawn(lines, across, floor=True)
    lines = []
    for model, method in dict.fromkeys((one.model, one.method) for one in results.pruning):
        own = [one for one in results.pruning if (one.model, one.method) == (model, method)]
        label = f"{model}, {'class attention' if method == 'attention' else method}"
        lines.append(_line(label, [one.rate for one in own], [one.top1 for one in own]))
    if any(line.x for line in lines):
        across = f"share of patches that each stage keeps, without training\n{_BAND}"
        yield "pruning", _drawn(lines, across, floor=True)
    for name, wanted in (("models", False), ("methods", True)):
        lines = [
            _learning(results, subject)
            for subject in results.runs
            if (subject.method is not None) == wanted
        ]
        if any(line.x for line in lines):
            yield f"convergence-{name}", _drawn(lines, f"epochs of training\n{_BAND}")


def _tradeoff(results: Results) -> Figure | None:
    """Accuracy over multiply-adds; base models are stars."""
    groups: dict[str, list[tuple[float, float, float, str, int]]] = {}
    stars: dict[str, tuple[float, float]] = {}
    started = {line.subject.model for line in results.lines if line.subject.method is not None}
    most = max((line.dense_macs.mean or 0 for line in results.lines), default=0)
    unit, scale = ("GMACs", 1e9) if most >= 1e9 else ("million multiply-adds", 1e6)
    for line in results.lines:
        subject, macs, top1 = line.subject, line.macs.mean, line.top1.mean
        if macs is None or top1 is None:
            continue
        if subject.method is None:
            if subject.model in started:  # others would widen the axes for nothing
                stars[f"{subject.model} (n {line.top1.n})"] = (macs / scale, top1)
            continue
        name = subject.method if subject.trained else f"{subject.method.split('(')[0]}, untrained"
        words = "" if subject.rate is None else f"{subject.rate:g}"
        point = (macs / scale, top1, line.top1.std or 0.0, words, line.top1.n)
        groups.setdefault(f"{subject.model}, {name}", []).append(point)
    lines = []
    for label, points in groups.items():
        x, y, std, rates, n = zip(*sorted(points), strict=True)
        low, high = (tuple(v + sign * s for v, s in zip(y, std, strict=True)) for sign in (-1, 1))
        # A band that shrank to nothing where there is one seed would look like certainty.
        banded = (low, high) if min(n) > 1 else ((), ())
        lines.append(Line(f"{label} ({_several(n)})", x, y, *banded, rates))
    if not lines:
        return None
    across = f"{unit} an image; numbers at points are rates\n{_BAND}"
    return lines_figure([one for one in lines if one.x], across=across, up=_UP, stars=stars)


def _learning(results: Results, subject: Subject) -> Line:
    """Accuracy over epochs, of the epochs that all finished seeds have."""
    runs = {}
    for seed, folder in results.runs[subject].items():
        try:
            runs[seed] = read_metric(folder)
        except ValueError:  # a run that was copied without its metrics
            continue
    if not runs:
        return Line(str(subject), (), ())
    epochs = sorted(set.intersection(*(set(run) for run in runs.values())))
    found = [Number({seed: run[epoch] for seed, run in runs.items()}) for epoch in epochs]
    return _line(str(subject), [epoch + 1 for epoch in epochs], found)


def _line(label: str, x: Sequence[float], found: Sequence[Number]) -> Line:
    """Means where there are any; the label says of how many seeds."""
    there = [(at, one.mean, one.std or 0.0) for at, one in zip(x, found, strict=True) if one.n]
    if not there:
        return Line(label, (), ())
    at, means, stds = zip(*((a, m or 0.0, s) for a, m, s in there), strict=True)
    label += f" ({_several([one.n for one in found if one.n])})"
    if min(one.n for one in found if one.n) < 2:
        return Line(label, at, means)
    low, high = (tuple(m + sign * s for m, s in zip(means, stds, strict=True)) for sign in (-1, 1))
    return Line(label, at, means, low, high)


def _drawn(lines: Sequence[Line], across: str, *, floor: bool = False) -> Figure:
    figure = lines_figure([line for line in lines if line.x], across=across, up=_UP)
    if floor:
        figure.axes[0].set_ylim(bottom=0)
    return figure


def _several(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"n {least}" if least == most else f"n {least}-{most}"
