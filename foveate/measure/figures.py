"""Pictures of a table: each is a group-by, means over seeds with a band of their deviation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foveate.measure.style import QUIET, line_look, new_figure
from foveate.measure.table import Results, over_seeds, pd, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Line", "figures", "lines_figure", "macs_unit"]

_WIDE, _HIGH = 5.2, 3.6  # inches of the axes, about
_MOST_WORDED = 5  # lines whose points can be named without covering each other
_TOP1 = "top-1 accuracy, %"


@dataclass(frozen=True)
class Line:
    """One line of a picture; ``low`` and ``high`` bound its band, ``words`` name its points."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    words: tuple[str, ...] = ()


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Draw every picture that the table has numbers for, with a name for its file."""
    table = results.table
    accuracy = select(table, part="accuracy")
    if (select(accuracy, metric="macs")["method"] != "").any():
        yield "accuracy-macs", tradeoff_figure(results)
    batches = select(table, part="speed", metric="per_second")["at"].unique()
    for batch in batches:
        name = "accuracy-speed" + f"-batch{batch:g}" * (len(batches) > 1)
        yield name, tradeoff_figure(results, batch=float(batch))
    lines = _lines(select(table, part="occlusion", metric="top1"), ["run"])
    if lines:
        across = "share of the image's patches dropped at random" + _band(table, lines)
        figure = lines_figure(lines, across=across, up=_TOP1)
        figure.axes[0].set_xlim(-0.02, 1.02)
        figure.axes[0].set_ylim(bottom=0)
        yield "occlusion", figure
    pruned = select(table, part="pruning", metric="top1")
    pruned = pruned.assign(at=pruned["rate"], rate=None)
    pruned = pruned.assign(method=pruned["method"].replace({"attention": "class attention"}))
    lines = _lines(pruned, ["run", "method"])
    if lines:
        across = "share of patches that each of three stages keeps, without training"
        across += _band(table, lines)
        figure = lines_figure(lines, across=across, up=_TOP1)
        figure.axes[0].set_ylim(bottom=0)
        yield "pruning", figure
    training = select(table, part="training", metric="val/accuracy")
    for name, part in (
        ("models", training[training["method"] == ""]),
        ("methods", training[training["method"] != ""]),
    ):
        lines = _lines(part, ["run", "method", "rate"])
        if lines:
            across, up = "epochs of training", "accuracy on validation images, %"
            across += _band(table, lines)
            yield f"convergence-{name}", lines_figure(lines, across=across, up=up)
    yield from _of_pretraining(results)


def _of_pretraining(results: Results) -> Iterator[tuple[str, Figure]]:
    """Draw progress and layers, one picture for each family of runs that are alike."""
    table = results.table
    like: Mapping[str, str] = results.about.get("like", {})
    curves = select(table, part="probe", metric="linear")
    curves = curves[curves["at"].notna()]
    layers = select(table, part="layers", metric="heterogeneity")
    for stem, part, across, up in (
        ("probe", curves, "epochs of pre-training", "linear probe, %"),
        ("layers", layers, "layer (0: initial embedding)", "heterogeneity at the end"),
    ):
        roots = part["run"].map(lambda run: like.get(run, run))
        for root, own in part.groupby(roots, sort=False):
            lines = _lines(own, ["run"])
            name = f"{stem}-{root}" if roots.nunique() > 1 else stem
            yield name, lines_figure(lines, across=across + _band(table, lines), up=up)


def _band(table: pd.DataFrame, lines: Sequence[Line]) -> str:
    """Say what bands are, where there are some."""
    if not any(line.low for line in lines):
        return ""
    if table["seed"].notna().any():
        return "\nband: standard deviation over seeds of training"
    draws = select(table, part=["occlusion", "pruning"])["draw"].nunique()
    return f"\nband: standard deviation over {draws} mask seeds"


def _lines(part: pd.DataFrame, by: Sequence[str]) -> list[Line]:
    """Return a line over ``at`` for each group; with several seeds its label says how many."""
    if not len(part):
        return []
    seeded = bool(part["seed"].notna().any())
    found = over_seeds(part, [*by, "at"])
    several = part["run"].nunique() > 1 or "method" not in by
    lines = []
    for key, group in found.groupby([*by], dropna=False, sort=False):
        names = dict(zip(by, key, strict=True))
        words = [str(names["run"])] if several else []
        if names.get("method"):
            words.append(label_of(names["method"], names.get("rate")))
        least, most = int(group["count"].min()), int(group["count"].max())
        count = f" (n {least})" if least == most else f" (n {least}-{most})"
        label = ", ".join(words) + count * seeded
        lines.append(_line(label, group.sort_values("at"), seeded))
    return lines


def _line(
    label: str, group: pd.DataFrame, seeded: bool, x: str = "at", words: tuple[str, ...] = ()
) -> Line:
    """Return the means, with a band of their deviation."""
    at, mean = (tuple(group[name].astype(float)) for name in (x, "mean"))
    # A band that shrank to nothing where there is one seed would look like certainty. Of one mask
    # seed, though, are the points at which nothing is dropped: there all masks are alike.
    single = group["count"] < 2
    if single.any() if seeded else single.all():
        return Line(label, at, mean, words=words)
    std = group["std"].fillna(0.0)
    low, high = tuple(group["mean"] - std), tuple(group["mean"] + std)
    return Line(label, at, mean, low, high, words)


def tradeoff_figure(results: Results, *, batch: float | None = None) -> Figure:
    """Draw accuracy against multiply-adds, or against measured speed: a line for each method.

    Points of one method on one model are joined and carry their rates, if there is room. Models
    without a method are stars.
    """
    table = results.table
    found = over_seeds(select(table, part=["accuracy", "speed"]))
    keys = ["run", "method", "rate"]
    wide = found[found["metric"] == "top1"][[*keys, "mean", "std", "count"]]
    macs = found[found["metric"] == "macs"][[*keys, "mean"]].rename(columns={"mean": "macs"})
    wide = wide.merge(macs, on=keys, how="inner")
    unit, scale = macs_unit(table)
    wide["across"] = wide["macs"] / scale
    if batch is not None:
        timed = found[(found["metric"] == "per_second") & (found["at"] == batch)]
        timed = timed[[*keys, "mean"]].rename(columns={"mean": "across"})
        wide = wide.drop(columns="across").merge(timed, on=keys, how="inner")
    seeded = bool(table["seed"].notna().any())
    marked = set(select(table, metric="untrained")["method"])
    wide["family"] = [
        _family(method, rate) + " (untrained)" * (method in marked)
        for method, rate in zip(wide["method"], wide["rate"], strict=True)
    ]
    reduced = wide[wide["method"] != ""]
    runs = reduced.groupby("family")["run"].nunique()
    lines = []
    for (run, family), group in reduced.groupby(["run", "family"], sort=False):
        group = group.sort_values("macs")
        label = f"{run}, {family}" if runs[family] > 1 else family
        label += f" (n {int(group['count'].min())})" * seeded
        words = tuple("" if pd.isna(rate) else f"{rate:g}" for rate in group["rate"])
        lines.append(_line(label, group, seeded, "across", words))
    if len(lines) > _MOST_WORDED:
        lines = [replace(line, words=()) for line in lines]
    dense = wide[wide["method"] == ""]
    started = dense[dense["run"].isin(reduced["run"])]  # others would widen the axes for nothing
    if len(started):
        dense = started
    stars: dict[str, tuple[float, float]] = {}
    for run, x, y, n in dense[["run", "across", "mean", "count"]].itertuples(index=False):
        label = "dense" if dense["run"].nunique() == 1 and not seeded else f"{run}, dense"
        if (x, y) not in stars.values():  # the same weights under another name
            stars[label + f" (n {n})" * seeded] = (x, y)
    across = f"{'million multiply-adds' if unit == 'MMACs' else unit} an image"
    if batch is not None:
        across = f"images a second at batch {batch:g}, measured"
    elif any(line.words for line in lines):
        across += "; numbers at points are rates"
    return lines_figure(lines, across=across + _band(table, lines), up=_TOP1, stars=stars)


def macs_unit(table: pd.DataFrame) -> tuple[str, float]:
    """Return the unit in which multiply-adds are small numbers, and its size."""
    most = select(table, metric="dense_macs")["value"].max()
    return ("GMACs", 1e9) if most >= 1e9 else ("MMACs", 1e6)


def label_of(method: str, rate: float | None) -> str:
    """Return a method with its rate, where the name does not say it."""
    if not method:
        return "dense"
    return method if "(" in method or rate is None or pd.isna(rate) else f"{method}-{rate:g}"


def _family(method: str, rate: float) -> str:
    """Return a method with its options but the rate: what is one line."""
    if not pd.isna(rate):
        method = re.sub(
            rf"\w+={re.escape(f'{rate:g}')}(?:\.0)?(?![\d.])(?:, )?", "", method, count=1
        )
    return method.removesuffix("()")


def lines_figure(
    lines: Sequence[Line],
    *,
    across: str,
    up: str,
    stars: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draw lines with their bands, and a legend beside the picture, where it covers nothing.

    Args:
        lines: in the order of the legend.
        across: what the horizontal axis is.
        up: what the vertical axis is.
        stars: single points by name, such as dense models.
    """
    names = [*(line.label for line in lines), *(stars or {})]
    beside = 0.085 * max(map(len, names), default=0)
    high = max(_HIGH, 0.3 + 0.2 * len(names))  # room for the legend
    figure, ((axes,),) = new_figure(_WIDE + beside, high)
    for number, line in enumerate(lines):
        style = line_look(number)
        if line.low:
            axes.fill_between(
                line.x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0
            )
        axes.plot(line.x, line.y, label=line.label, **style)
        rising = line.y[-1] >= line.y[0]  # words stand where the line does not go
        for x, y, words in zip(line.x, line.y, line.words, strict=False):
            axes.annotate(
                words,
                (x, y),
                xytext=(5, -10 if rising else 4),
                textcoords="offset points",
                fontsize=7,
                color=style["color"],
            )
    if all(float(x).is_integer() for line in lines for x in line.x):  # epochs, layers
        axes.xaxis.get_major_locator().set_params(integer=True)
    for number, (name, (x, y)) in enumerate((stars or {}).items()):
        colour = "black" if number == 0 else line_look(number)["color"]
        axes.plot([x], [y], "*", color=colour, markersize=12, label=name, linestyle="none")
        axes.axhline(y, color=QUIET, linewidth=0.7, linestyle=":", zorder=0)
    axes.margins(0.09)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure
