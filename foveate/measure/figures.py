"""Pictures of a table: each is a group-by, means over seeds with a band of their deviation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from foveate.measure.style import QUIET, line_look, new_figure
from foveate.measure.table import Results, over_seeds, pd, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures", "label_of", "lines_figure", "macs_unit", "tradeoff_figure"]

_WIDE, _HIGH = 5.2, 3.6  # inches of the axes, about
_MOST_WORDED = 5  # lines whose points can be named without covering each other
_TOP1 = "top-1 accuracy, %"
# Scores of detectors and segmenters, with which a name of a file begins.
_DENSE = {"box_ap": "average precision of boxes, %", "mask_ap": "average precision of masks, %"}
_DENSE |= {"miou": "mean IoU, %"}
_VALIDATED = {"accuracy": "accuracy, %,", "box_ap": "AP of boxes", "miou": "mean IoU"}

# Readings of frozen features, and the names of their pictures.
_READINGS = (("linear", "probe", "linear probe, %"), ("knn", "knn", "nearest neighbours, %"))

# Lines by label, over the column "at": "mean", and "std" where a band shows it.
Lines = Mapping[str, pd.DataFrame]


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
    judged = select(table, part="dense")
    if (judged["method"] != "").any():
        for score in _DENSE:
            if (judged["metric"] == score).any():
                yield f"{score.replace('_', '-')}-macs", tradeoff_figure(results, score=score)
    occluded = select(table, part="occlusion", metric="top1")
    if len(occluded):
        across = "share of the image's patches dropped at random"
        figure = _curves(table, occluded, ["run"], across, _TOP1)
        figure.axes[0].set_xlim(-0.02, 1.02)
        figure.axes[0].set_ylim(bottom=0)
        yield "occlusion", figure
    pruned = select(table, part="pruning", metric="top1")
    if len(pruned):
        method = pruned["method"].replace({"attention": "class attention"})
        pruned = pruned.assign(at=pruned["rate"], rate=None, method=method)
        across = "share of patches that each of three stages keeps, without training"
        figure = _curves(table, pruned, ["run", "method"], across, _TOP1)
        figure.axes[0].set_ylim(bottom=0)
        yield "pruning", figure
    for metric, words in _VALIDATED.items():
        training = select(table, part="training", metric=f"val/{metric}")
        dense = training["method"] == ""
        for name, part in (("models", training[dense]), ("methods", training[~dense])):
            if part["at"].nunique() > 1:  # one epoch shows no way there
                keys, up = ["run", "method", "rate"], f"{words} on validation images"
                stem = f"convergence-{name}" + f"-{metric}".replace("_", "-") * (metric in _DENSE)
                yield stem, _curves(table, part, keys, "epochs of training", up)
    if (select(table, part="time", metric="before")["value"] > 0).any():
        for score, up in (("top1", _TOP1), *_DENSE.items()):
            if (table["metric"] == score).any():
                yield "minutes" + f"-{score}" * (score in _DENSE), _over_minutes(table, score, up)
    # Pre-training: a picture for each family of runs that are alike.
    like: Mapping[str, str] = results.about.get("like", {})
    keys = ["run", "seed", "at"]
    took = select(table, part="training", metric="seconds").rename(columns={"value": "took"})
    pictures = []
    for metric, stem, up in _READINGS:
        scores = select(table, part="probe", metric=metric)
        scores = scores[scores["at"].notna()]
        timed = scores.merge(took[[*keys, "took"]], on=keys)
        timed = timed.assign(at=timed.groupby(["run", "at"])["took"].transform("mean"))
        pictures += [
            (stem, scores, "epochs of pre-training", up),
            (f"{stem}-seconds", timed, "seconds of pre-training, mean over seeds", up),
        ]
    layers = select(table, part="layers", metric="heterogeneity")
    pictures.append(("layers", layers, "layer (0: initial embedding)", "heterogeneity at the end"))
    for stem, part, across, up in pictures:
        roots = part["run"].map(lambda run: like.get(run, run))
        for root, own in part.groupby(roots, sort=False):
            name = f"{stem}-{root}" if roots.nunique() > 1 else stem
            yield name, _curves(table, own, ["run"], across, up)


def _curves(table: pd.DataFrame, part: pd.DataFrame, by: list[str], across: str, up: str) -> Figure:
    """Draw a line over ``at`` for each group; with several seeds its label says how many."""
    seeded = bool(part["seed"].notna().any())
    several = part["run"].nunique() > 1 or "method" not in by
    lines = {}
    for key, group in over_seeds(part, [*by, "at"]).groupby(by, dropna=False, sort=False):
        names = dict(zip(by, key, strict=True))
        words = [str(names["run"])] if several else []
        if names.get("method"):
            words.append(label_of(names["method"], names.get("rate")))
        least, most = group["count"].min(), group["count"].max()
        count = f" (n {least})" if least == most else f" (n {least}-{most})"
        lines[", ".join(words) + count * seeded] = _banded(group.sort_values("at"), seeded)
    return lines_figure(lines, across=across + _band(table, lines), up=up)


def _over_minutes(table: pd.DataFrame, score: str, up: str) -> Figure:
    """Draw a point for each model: its score over the minutes of training that went into it."""
    keys = ["run", "method", "rate"]
    found = over_seeds(select(table, part=["time", "accuracy", "dense"])).drop(columns="at")
    minutes = found[found["metric"] == "in_all"].rename(columns={"mean": "at"})
    points = found[found["metric"] == score].merge(minutes[[*keys, "at"]], on=keys)
    points[["mean", "std"]] *= 100 if score in _DENSE else 1
    seeded = bool(table["seed"].notna().any())
    lines = {}
    for (run, method, rate), group in points.groupby(keys, dropna=False, sort=False):
        label = f"{run}, {label_of(method, rate)}" if method else str(run)
        lines[label + f" (n {group['count'].min()})" * seeded] = _banded(group, seeded)
    across = "minutes of training in all, pre-training and teachers included"
    return lines_figure(lines, across=across + _band(table, lines), up=up)


def _banded(group: pd.DataFrame, seeded: bool) -> pd.DataFrame:
    """Return a line that has a deviation at every point, or none at any.

    A band that shrank to nothing where there is one seed would look like certainty. Of one mask
    seed, though, are the points at which nothing is dropped: there all masks are alike.
    """
    single = group["count"] < 2
    bare = single.any() if seeded else single.all()
    return group.assign(std=float("nan") if bare else group["std"].fillna(0.0))


def _band(table: pd.DataFrame, lines: Lines) -> str:
    """Say what bands, or bars of single points, are, where there are some."""
    spread = {len(line) > 1 for line in lines.values() if line["std"].notna().all()}
    if not spread:
        return ""
    shown = " or ".join(name for name, wide in (("band", True), ("bar", False)) if wide in spread)
    if table["seed"].notna().any():
        return f"\n{shown}: standard deviation over seeds of training"
    draws = select(table, part=["occlusion", "pruning"])["draw"].nunique()
    return f"\n{shown}: standard deviation over {draws} mask seeds"


def tradeoff_figure(results: Results, *, batch: float | None = None, score: str = "top1") -> Figure:
    """Draw accuracy against multiply-adds, or against measured speed: a line for each method.

    Points of one method on one model are joined and carry their rates, if there is room. Models
    without a method are stars. Scores of detectors and segmenters stand against the multiply-adds
    of their backbone, which is what methods change.
    """
    table = results.table
    dense_task = score in _DENSE
    parts = ["dense"] if dense_task else ["accuracy", "speed"]
    found = over_seeds(select(table, part=parts))
    keys = ["run", "method", "rate"]
    wide = found[found["metric"] == score].drop(columns=["part", "at", "metric"])
    wide[["mean", "std"]] *= 100 if dense_task else 1
    unit, scale = macs_unit(table)
    across = f"{'million multiply-adds' if unit == 'MMACs' else unit} an image"
    across += " in the backbone" * dense_task
    spent = "backbone_macs" if dense_task else "macs"
    macs = found[found["metric"] == spent].rename(columns={"mean": "macs"})
    wide = wide.merge(macs[[*keys, "macs"]], on=keys)
    wide["at"] = wide["macs"] / scale
    if batch is not None:
        across = f"images a second at batch {batch:g}, measured"
        timed = found[(found["metric"] == "per_second") & (found["at"] == batch)]
        timed = timed[[*keys, "mean"]].rename(columns={"mean": "at"})
        wide = wide.drop(columns="at").merge(timed, on=keys)
    seeded = bool(table["seed"].notna().any())
    marked = set(select(table, metric="untrained")["method"])
    wide["family"] = [
        _family(method, rate) + " (untrained)" * (method in marked)
        for method, rate in zip(wide["method"], wide["rate"], strict=True)
    ]
    reduced, dense = wide[wide["method"] != ""], wide[wide["method"] == ""]
    runs = reduced.groupby("family")["run"].nunique()
    lines = {}
    for (run, family), group in reduced.groupby(["run", "family"], sort=False):
        label = f"{run}, {family}" if runs[family] > 1 else family
        label += f" (n {group['count'].min()})" * seeded
        lines[label] = _banded(group.sort_values("macs"), seeded)
    worded = len(lines) <= _MOST_WORDED and bool(reduced["rate"].notna().any())
    started = dense[dense["run"].isin(reduced["run"])]
    if len(started) and not dense_task:  # others only where they do not widen the axes
        points = pd.concat([reduced, started])
        fits = [dense[a].between(points[a].min(), points[a].max()) for a in ("at", "mean")]
        dense = dense[fits[0] & fits[1]]
    stars: dict[str, tuple[float, float]] = {}
    for run, x, y, n in dense[["run", "at", "mean", "count"]].itertuples(index=False):
        alone = dense["run"].nunique() == 1 and not seeded
        label = "dense" if alone or run == "dense" else f"{run}, dense"
        if (x, y) not in stars.values():  # the same weights under another name
            stars[label + f" (n {n})" * seeded] = (x, y)
    if worded and batch is None:
        across += "; numbers at points are rates"
    across += _band(table, lines)
    up = _DENSE.get(score, _TOP1)
    return lines_figure(lines, across=across, up=up, stars=stars, rates=worded)


def macs_unit(table: pd.DataFrame) -> tuple[str, float]:
    """Return the unit in which multiply-adds are small numbers, and its size."""
    most = table[table["metric"].isin(("macs", "dense_macs"))]["value"].max()
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
    lines: Lines,
    *,
    across: str,
    up: str,
    stars: Mapping[str, tuple[float, float]] | None = None,
    rates: bool = False,
) -> Figure:
    """Draw lines with their bands, and a legend beside the picture, where it covers nothing.

    Args:
        lines: in the order of the legend.
        across: what the horizontal axis is.
        up: what the vertical axis is.
        stars: single points by name, such as dense models.
        rates: write the column "rate" beside the points.
    """
    stars = stars or {}
    names = [*lines, *stars]
    beside = 0.085 * max(map(len, names), default=0)
    high = max(_HIGH, 0.3 + 0.2 * len(names))  # room for the legend
    figure, ((axes,),) = new_figure(_WIDE + beside, high)
    for number, (label, line) in enumerate(lines.items()):
        style = line_look(number)
        x, y, std = (line[name].astype(float) for name in ("at", "mean", "std"))
        if std.notna().all() and len(x) > 1:
            axes.fill_between(x, y - std, y + std, color=style["color"], alpha=0.18, linewidth=0)
        elif std.notna().all():
            axes.errorbar(x, y, std, fmt="none", ecolor=style["color"], capsize=3, linewidth=1)
        axes.plot(x, y, label=label, **style)
        if rates:
            below = -10 if y.iloc[-1] >= y.iloc[0] else 4  # put the words where the line is not
            for where, rate in zip(zip(x, y, strict=True), line["rate"], strict=True):
                words = "" if pd.isna(rate) else f"{rate:g}"
                place = {"xytext": (5, below), "textcoords": "offset points", "fontsize": 7}
                axes.annotate(words, where, color=style["color"], **place)
    if all(float(x).is_integer() for line in lines.values() for x in line["at"]):  # epochs, layers
        axes.xaxis.get_major_locator().set_params(integer=True)
    for number, (name, (x, y)) in enumerate(stars.items()):
        colour = "black" if number == 0 else line_look(number)["color"]
        axes.plot([x], [y], "*", color=colour, markersize=12, label=name, linestyle="none")
        axes.axhline(y, color=QUIET, linewidth=0.7, linestyle=":", zorder=0)
    axes.margins(0.09)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if any(names):  # a single line may have none
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure
