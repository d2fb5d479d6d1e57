"""Sheets for the terminal and for Markdown: parts of the long table, grouped and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from foveate.measure.figures import label_of, macs_unit
from foveate.measure.table import MISSING, Results, formatted, grid, over_seeds, pd, said, select
from foveate.timing import LEAST_ROUNDS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Sheet", "html_table", "markdown", "markdown_table", "sheets", "show", "terminal"]

_SPLITS = {"train": "training ", "val": "validation ", "test": "test "}
# Digits of a part; others have two.
_DIGITS = {"occlusion": 1, "pruning": 1, "tokens": 1, "probe": 1, "dense": 1, "time": 1}
_SHARES = ("used", "used_last", "usage", "usage_deviation", "reactivation", "at_once")
# Scores of detectors and segmenters, 0..1 in the table.
_SCORES = {"box_ap": "box AP", "box_ap50": "AP50", "box_small": "of small", "mask_ap": "mask AP"}
_SCORES |= {"mask_small": "of small masks", "miou": "mean IoU"}
_KINDS = {"box_ap": " of detectors", "miou": " of segmenters"}
_MACS = ("macs", "dense_macs", "backbone_macs")


@dataclass(frozen=True)
class Sheet:
    """A table in words.

    Attributes:
        title: title above the table.
        table: text of every cell; the names of the columns are the head.
        words: columns that hold words, which are aligned left; the others hold numbers.
        notes: sentences below the table.
        spare: columns that a narrow terminal leaves out, in this order.
    """

    title: str
    table: pd.DataFrame
    words: Sequence[str] = ("model", "method")
    notes: Sequence[str] = ()
    spare: Sequence[str] = ()


# Writing -----------------------------------------------------------------------------------------


def terminal(width: int = 140) -> Console:
    """Return the terminal as it is; a file or pipe is wide enough for the tables."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def show(sheet: Sheet, console: Console) -> None:
    """Print a sheet with title and notes; leave spare columns out if it is too wide."""
    from rich.text import Text

    found = sheet.table
    for name in (*sheet.spare, None):
        table = _printed(found, sheet.words)
        wide = console.measure(table, options=console.options.update(width=10_000)).maximum
        if name is None or wide <= console.width:
            break
        found = found.drop(columns=name, errors="ignore")
    console.print(Text(sheet.title, style="bold"), table, *map(Text, sheet.notes), "", sep="\n")


def _printed(found: pd.DataFrame, words: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in found:
        table.add_column(
            name,
            justify="left" if name in words else "right",
            no_wrap=name not in words or not name or "[" in name,  # intervals stay in one piece
            overflow="fold",
        )
    for line in found.itertuples(index=False):
        table.add_row(*map(Text, line))
    return table


def markdown(
    results: Results,
    pictures: Sequence[str] = (),
    title: str = "Evaluation",
    first: Sequence[Sheet] = (),
) -> str:
    """Write everything as one Markdown page.

    Args:
        results: what was found.
        pictures: names of the files beside the page that it shows.
        title: of the page.
        first: sheets in front of those that the table gives.
    """
    about = results.about
    lines = [f"# {title}", ""]
    if about.get("command"):
        lines += [f"    {about['command']}", ""]
    for column in ("machine", "commit"):
        counts = results.table.groupby(column, sort=False).size()
        lines += [f"- {column}: {name or 'unknown'} ({n} numbers)" for name, n in counts.items()]
    facts = about.get("machine", {})
    lines += [f"- versions: torch {facts['torch']}, timm {facts['timm']}"] if facts else []
    settings = {k: v for k, v in about.get("settings", {}).items() if v is not None}
    lines += [f"- {name}: {_said(value)}" for name, value in settings.items()]
    lines += [""]
    for run, known in about.get("models", {}).items():
        words = "; ".join(f"{k} {_said(v)}" for k, v in known.items() if v is not None)
        lines += [f"**{run}**: {words}", ""]
    for sheet in (*first, *sheets(results)):
        lines += [f"## {sheet.title}", "", *markdown_table(sheet), ""]
        lines += [line for note in sheet.notes for line in (note, "")]
    lines += [line for name in pictures for line in (f"![{name.rpartition('.')[0]}]({name})", "")]
    if "recipe" in about:
        lines += ["## Settings", "", "```yaml", about["recipe"].rstrip(), "```"]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(sheet: Sheet) -> list[str]:
    """Return the lines of a table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    marks = ["---" if name in sheet.words else "---:" for name in sheet.table]
    return [line([*sheet.table]), line(marks), *map(line, sheet.table.itertuples(index=False))]


def html_table(sheet: Sheet) -> str:
    """Return a table in HTML, a line for each row; cells that hold words have the class "words"."""
    marks = [' class="words"' if name in sheet.words else "" for name in sheet.table]

    def line(cells: Sequence[str], kind: str) -> str:
        marked = (f"<{kind}{m}>{escape(c)}</{kind}>" for c, m in zip(cells, marks, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    head, body = line([*sheet.table], "th"), sheet.table.itertuples(index=False)
    rows = "\n".join(line(cells, "td") for cells in body)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# Numbers -----------------------------------------------------------------------------------------


class _Numbers:
    """Means over seeds, each with its text: deviation and number of seeds included.

    Attributes:
        table: every number as it was measured.
        over: a line for each mean, with the method as tables call it, and the text as its value.
        seeded: whether models were trained with seeds.
        expected: for how many seeds a comparison wants which subject, by part.
    """

    def __init__(self, results: Results) -> None:
        self.table, self.about = results.table, results.about
        self.seeded = bool(self.table["seed"].notna().any())
        self.expected: dict[str, dict[tuple[str, str], int]] = {}
        for part, run, method, rate, n in self.about.get("expected", []):
            self.expected.setdefault(part, {})[run, label_of(method, rate)] = n
        logged: dict[str, int] = self.about.get("features", {})
        self.wanted = {(run, label_of("", None)): n for run, n in logged.items()}
        for named in self.expected.values():
            self.wanted |= named
        self.unit, scale = macs_unit(self.table)
        over = over_seeds(self.table)
        over["method"] = list(map(label_of, over["method"], over["rate"]))
        over.loc[over["metric"].isin(_MACS), ["mean", "std"]] /= scale
        over.loc[over["metric"].isin((*_SHARES, *_SCORES)), ["mean", "std"]] *= 100
        self.over = over.assign(value=[self._text(line) for line in over.itertuples(index=False)])

    def _text(self, line: Any) -> str:
        if line.metric == "kept":
            return f"{line.mean:.0f}"
        counts = line.part == "tokens" or line.metric in (*_MACS, "tokens")
        rounding = counts and not line.std > 1e-3 * abs(line.mean)
        digits = 1 if line.metric == "tokens" else _DIGITS.get(line.part, 2)
        digits += line.part == "dense" and line.metric in _MACS
        text = said(line.mean, float("nan") if rounding else line.std, digits)
        if not self.seeded:
            return text
        wanted = self.wanted.get((line.run, line.method), line.count)
        return f"{text} ({line.count}{f' of {wanted}' * (line.count < wanted)})"

    def part(self, part: str) -> pd.DataFrame:
        """Return the means of a part."""
        return select(self.over, part=part)


_SUBJECT = ["run", "method"]


def _titled(found: pd.DataFrame) -> pd.DataFrame:
    """Return a grid by subject as it is shown: the model is named where there are several."""
    found = found.rename_axis(["model", "method"]).reset_index()
    return found if found["model"].nunique() > 1 else found.drop(columns="model")


def sheets(results: Results, *, blocks: bool = True) -> Iterator[Sheet]:
    """Return all sheets for which the table has numbers.

    Args:
        results: a table and how it came about.
        blocks: also those of the tokens of single models, block by block.
    """
    numbers = _Numbers(results)
    for part, maker in _MAKERS.items():
        own = numbers.part(part)
        if len(own) or part in numbers.expected:
            yield from maker(numbers, own)
    cells = results.about.get("cells", {})
    absent = [(n, one["kind"], one["why"]) for n, one in cells.items() if one["kind"] != "done"]
    if absent:
        table = pd.DataFrame(absent, columns=["cell", "state", "why"])
        yield Sheet(f"Cells that are not there: {len(absent)} of {len(cells)}", table, [*table])
    if blocks and not numbers.seeded:
        yield from _per_block(numbers.part("tokens"))


# The sheets --------------------------------------------------------------------------------------


def _subjects(numbers: _Numbers, own: pd.DataFrame, part: str) -> pd.MultiIndex:
    """Return all subjects that a table should have, in the order of the comparison."""
    there = zip(own["run"], own["method"], strict=True)
    return pd.MultiIndex.from_tuples(dict.fromkeys([*numbers.expected.get(part, {}), *there]))


def _filled(table: pd.DataFrame, expected: Mapping[tuple[str, str], int]) -> pd.DataFrame:
    """Return a table with "missing" where a comparison expects a number, and "-" elsewhere."""
    absent = [MISSING if subject in expected else "-" for subject in table.index]
    return table.apply(lambda column: column.fillna(pd.Series(absent, table.index)))


def _on_images(numbers: _Numbers, part: str) -> str:
    """Return the number of images and their split, for a title; "" if there were none."""
    images = select(numbers.table, part=part, metric="images")["value"]
    kind = _SPLITS.get(str(numbers.about.get("settings", {}).get("split")), "")
    counts = " or ".join(f"{count:.0f}" for count in sorted(images.unique()))
    return f" on {counts} {kind}images" if counts else ""


def _accuracy(numbers: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    subjects = _subjects(numbers, own, "accuracy")
    text = grid(own, _SUBJECT).reindex(subjects)
    means = grid(own, _SUBJECT, values="mean").reindex(subjects)
    table = pd.DataFrame(index=subjects)
    for head, metric in (("top-1 %", "top1"), ("top-5 %", "top5"), ("drop", "drop")):
        if metric in text or metric == "top1":
            table[head] = text.get(metric)
    if "macs" in text:
        table[numbers.unit] = text["macs"]
        table["of dense"] = formatted(means["macs"] / means["dense_macs"], ".0%")
        table["tokens left"] = text["tokens"]
    speed = numbers.part("speed")
    batches = sorted(speed["at"].unique(), reverse=True)
    timed = [f"× dense, batch {batch:g}" for batch in batches]
    for head, batch in zip(timed, batches, strict=True):
        table[head] = _times(numbers, speed[speed["at"] == batch])
    if len(batches) == 1:
        table["images/s"] = formatted(grid(speed, _SUBJECT, values="mean")["per_second"], ".4g")
    table = _filled(table, numbers.expected.get("accuracy", {}))
    if "drop" in table:
        table.loc[table.index.get_level_values(1) == label_of("", None), "drop"] = ""
    table = _titled(table)
    if "untrained" in text:
        table["method"] += [" *" * there for there in text["untrained"].notna()]
    yield Sheet(
        "Accuracy" + _on_images(numbers, "accuracy"),
        table,
        notes=[*_notes(numbers, set(own["metric"]))],
        spare=("top-5 %", "images/s", "of dense", "tokens left", "drop", *timed[1:]),
    )


def _notes(numbers: _Numbers, there: set[str]) -> Iterator[str]:
    if "untrained" in there:
        yield "* new parameters that nobody trained: what it keeps is arbitrary."
    if numbers.seeded:
        words = "Mean ± standard deviation over seeds of training, with their number in brackets."
        if "drop" in there:
            words += (
                " A method without options was trained with the model, one with options runs on "
                "the model as it is. Drop: points below the dense model of the same seed."
            )
        yield words
    if "measured" in there:
        yield "Multiply-adds and tokens are means over the images where counts differ."
    speed = select(numbers.table, part="speed")
    if len(speed):
        rounds = select(speed, metric="rounds")["value"].min()
        trial = " (a trial, not a result)" * bool(rounds < LEAST_ROUNDS)
        spread = select(speed, metric="spread")["value"].max()
        yield (
            f"Speed: {rounds:.0f} interleaved rounds{trial}, median ratio with its 95 % interval; "
            f"a dense model compared with itself strays by up to {spread:.0%}, so smaller "
            "differences mean nothing."
        )


def _times(numbers: _Numbers, speed: pd.DataFrame) -> pd.Series:
    """Return ratios with their interval; over several seeds, with their deviation."""
    if numbers.seeded:
        return grid(speed, _SUBJECT)["times"]
    means = grid(speed, _SUBJECT, values="mean")
    ends = [formatted(means[name], ".2f") for name in ("times", "low", "high")]
    return ends[0] + " [" + ends[1] + ", " + ends[2] + "]"


def _dense(numbers: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    """Return scores and costs of detectors and of segmenters, then their speed."""
    text = grid(own, _SUBJECT).reindex(_subjects(numbers, own, "dense"))
    kinds = {metric: words for metric, words in _KINDS.items() if metric in text}
    if len(kinds) < 2:
        yield _dense_scores(numbers, text)
    else:
        for metric, words in kinds.items():  # what has no score yet may be of any kind
            others = text[[*kinds.keys() - {metric}]].notna().any(axis=1)
            yield _dense_scores(numbers, text[~others].dropna(axis=1, how="all"), words)
    timed = numbers.part("dense speed")
    if len(timed):
        yield _dense_speed(numbers, timed)


def _dense_scores(numbers: _Numbers, text: pd.DataFrame, kind: str = "") -> Sheet:
    table = pd.DataFrame(index=text.index)
    for metric, words in _SCORES.items():
        if metric in text:
            table[words] = text[metric].replace("nan", "no objects")
    for metric, words in (("macs", numbers.unit), ("backbone_macs", "of the backbone")):
        table[words] = text.get(metric)
    table["patches used %"] = text.get("usage")
    notes = ["Multiply-adds and patches are means over images of the data, counted as they ran."]
    return Sheet(
        f"Scores{kind}{_on_images(numbers, 'dense')}, %",
        _titled(_filled(table, numbers.expected.get("dense", {}))),
        notes=[*_notes(numbers, set()), *notes],
        spare=("AP50", "of small masks", "of small"),
    )


def _dense_speed(numbers: _Numbers, own: pd.DataFrame) -> Sheet:
    keys = [*_SUBJECT, "at"]
    text, means = grid(own, keys), grid(own, keys, values="mean")
    table = pd.DataFrame({"batch": means.index.get_level_values("at").map("{:.0f}".format)})
    table.index = means.index
    for part, prefix in (("network", ""), ("backbone", "backbone_")):
        table[f"{part}, images/s"] = formatted(means[f"{prefix}per_second"], ".2f")
        ratio = text[f"{prefix}times"]
        if not numbers.seeded:
            ends = (formatted(means[prefix + end], ".2f") for end in ("low", "high"))
            ratio = formatted(means[f"{prefix}times"], ".2f") + (" [" + next(ends) + ", ")
            ratio += next(ends) + "]"
        table[f"{part}, times dense"] = ratio
    note = "Of the dense model: its ratio to itself in the same run, which is the noise."
    return Sheet("Speed, interleaved", _titled(table.droplevel("at")), notes=[note])


def _occlusion(numbers: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    own = own.sort_values("at", kind="stable")
    top1, kept = (
        grid(select(own, metric=name), "at", "run").fillna("-") for name in ("top1", "kept")
    )
    table = pd.DataFrame({"dropped": [f"{ratio:g}" for ratio in top1.index]}, index=top1.index)
    same = kept.nunique(axis=1).max() == 1
    for place, run in enumerate(top1):
        if place == 0 or not same:
            table["kept" if same else f"kept of {run}"] = kept[run]
        table[run] = top1[run]
    title = "Top-1 % with patches of the image dropped at random"
    yield Sheet(title, table, (), [_over_masks(numbers, "occlusion")])


def _over_masks(numbers: _Numbers, part: str) -> str:
    draws = select(numbers.table, part=part)["draw"].nunique()
    if numbers.seeded:
        return (
            f"Each seed of training is a mean over {draws} mask seeds; ± and the number in "
            "brackets are of training."
        )
    return f"Mean ± standard deviation over {draws} mask seeds."


def _pruning(numbers: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    keys = ["run", "rate"]
    own = own.assign(method=own["method"].str.partition("-")[0])
    text = grid(select(own, metric="top1"), keys, "method")
    kept = select(own, metric="kept", method="random")
    table = pd.DataFrame(index=text.index)
    table["kept"] = kept.groupby(keys)["value"].agg(" ".join)
    table["random"] = text["random"]
    if numbers.seeded:
        random = select(numbers.table, part="pruning", method="random", metric="top1")
        masks = random.groupby([*keys, "seed"], dropna=False)["value"].std()
        table["± of masks"] = formatted(masks.groupby(keys).mean(), ".1f")
    table["class attention"] = text["attention"]
    table = table.rename_axis(["model", "rate"]).reset_index()
    table["rate"] = formatted(table["rate"], "g")
    if table["model"].nunique() == 1:
        table = table.drop(columns="model")
    blocks = {tuple(one["at"].unique()) for _, one in kept.groupby("run")}
    where = "three blocks"  # models of different depth have different ones
    if len(blocks) == 1:
        (found,) = blocks
        where = f"block{'s' * (len(found) > 1)} " + ", ".join(f"{block:g}" for block in found)
    title = f"Top-1 % pruned before {where}, without training"
    yield Sheet(title, table, notes=[_over_masks(numbers, "pruning")])


def _tokens(numbers: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    whole = own[own["at"].isna()]
    text, means = (grid(whole, _SUBJECT, values=values) for values in ("value", "mean"))
    heads = {"mean": "tokens", "deviation": "± of images", "last": "last block"}
    table = text.rename(columns=heads | {"used": "used %", "used_last": "last %"})
    table["5-95 %"] = formatted(means["low"], ".1f") + "-" + formatted(means["high"], ".1f")
    shown = ["tokens", "± of images", "5-95 %", "last block", "used %", "last %"]
    title = "Tokens of an image, mean over its blocks, and patches used"
    yield Sheet(title, _titled(table[shown]), spare=("5-95 %", "± of images"))


def _per_block(own: pd.DataFrame) -> Iterator[Sheet]:
    for (run, method), found in own.groupby(_SUBJECT, sort=False):
        text = grid(found[found["at"].notna()], "at").sort_index()
        wanted = ["tokens", "usage", "usage_deviation", "reactivation", "at_once"]
        text = text.reindex(columns=wanted).astype(object).fillna("-")
        table = pd.DataFrame(
            {
                "block": [f"{block:g}" for block in text.index],
                "tokens": text["tokens"],
                "patches used %": text["usage"] + " ± " + text["usage_deviation"],
                "of unused, used later %": text["reactivation"],
                "of those, at once %": text["at_once"],
            },
        )
        images = select(found, metric="images")["mean"].iloc[0]
        note = f"over {images:.0f} images; ± is the standard deviation over images"
        yield Sheet(f"{run}, {method}: tokens block by block", table, (), [note])


def _probe(_: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    """Return scores of frozen features: by epoch, or of models that were probed once."""
    for metric, words in (("linear", "Linear probe"), ("knn", "Nearest neighbours")):
        yield from _by_run(own, metric, "epoch", f"{words} on frozen features, %")


def _layers(_: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    title = "Heterogeneity of hidden tokens by layer at the end"
    yield from _by_run(own, "heterogeneity", "layer", title)
    if (own["metric"] == "heterogeneity_1").any():
        yield from _by_run(own, "heterogeneity_1", "layer", f"{title}, second network")


def _by_run(own: pd.DataFrame, metric: str, head: str, title: str) -> Iterator[Sheet]:
    """Return a line for each run and a column for each value of ``at``; none is the end."""
    table = grid(select(own, metric=metric), "run", "at").fillna("-")
    table = table[sorted(table, key=lambda at: (pd.isna(at), at))]
    table.columns = ["at the end" if pd.isna(at) else f"{head} {at:g}" for at in table]
    if len(table):
        yield Sheet(title, table.rename_axis("model").reset_index())


def _efficiency(numbers: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    """Return RAUC and what is saved, of each run over the one that it is compared with."""
    for over, unit in (("", "epochs"), ("_seconds", "seconds of training")):
        wanted = ["rauc" + over, "mean_curves" + over]
        if over and not own["metric"].isin(wanted).any():
            continue
        text, means = (
            grid(own, _SUBJECT, values=values).reindex(columns=wanted)
            for values in ("value", "mean")
        )
        saved = select(numbers.table, part="rauc", metric="saved" + over).sort_values("seed")
        saved = saved.assign(value=formatted(saved["value"], ".0%")).groupby(_SUBJECT)["value"]
        like = numbers.about.get("like", {})
        table = pd.DataFrame(index=text.index)
        table["over"] = [str(like.get(run, "")) for run, _ in text.index]
        table["RAUC"] = text[wanted[0]]
        table["of the mean curves"] = formatted(means[wanted[1]], ".2f")
        table["saved, seed by seed"] = saved.agg(", ".join)
        table = table.astype(object).fillna("-").rename_axis(["model", "score"]).reset_index()
        words = ("model", "score", "over", "saved, seed by seed")
        note = (
            f"Saved: share of the {unit} after which the model is as good as the other at its end."
        )
        notes = [note, *(() if over else numbers.about.get("notes", []))]
        yield Sheet(f"RAUC and {unit} to match", table, words, notes)


def _time(numbers: _Numbers, own: pd.DataFrame) -> Iterator[Sheet]:
    """Return the minutes that went into each model beside its score, where both are known."""
    text = grid(own, _SUBJECT)
    table = pd.DataFrame(index=text.index)
    for head, metric in (("before", "before"), ("own", "own"), ("in all", "in_all")):
        table[head] = text[metric]
    scores = {"top1": "top-1 %", **_SCORES}
    judged = grid(numbers.over[numbers.over["part"].isin(("accuracy", "dense"))], _SUBJECT)
    for metric, words in scores.items():
        if metric in judged:
            table[words] = judged[metric]
    note = (
        "Before: pre-training, teachers and all else that the model needed. Minutes are without "
        "evaluations and readings of features, on a CPU of processor time over threads."
    )
    table = _titled(table.astype(object).fillna("-"))
    if (table["method"] == label_of("", None)).all():
        table = table.drop(columns="method")
    yield Sheet("Minutes of training", table, notes=[note])


_MAKERS = {
    "accuracy": _accuracy,
    "dense": _dense,
    "occlusion": _occlusion,
    "pruning": _pruning,
    "tokens": _tokens,
    "probe": _probe,
    "rauc": _efficiency,
    "time": _time,
    "layers": _layers,
}
