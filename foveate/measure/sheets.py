"""A table in words: sheets for the terminal and for Markdown, each a group-by."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foveate.bench.timing import LEAST_ROUNDS
from foveate.measure.figures import label_of, macs_unit
from foveate.measure.table import MISSING, Results, over_seeds, pd, said, select

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Sheet", "markdown", "markdown_table", "sheets", "show", "terminal"]

Subject = tuple[str, str, float | None]  # run, method, rate
_SPLITS = {"train": "training ", "val": "validation ", "test": "test "}


@dataclass(frozen=True)
class Sheet:
    """A table in words.

    Attributes:
        title: above it.
        head: columns; those whose name begins with "<" hold text, the others numbers.
        body: lines.
        notes: sentences below it.
        spare: columns that a narrow terminal does without, the first one first.
    """

    title: str
    head: tuple[str, ...]
    body: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()
    spare: tuple[str, ...] = ()

    def without(self, name: str) -> Sheet:
        """Return the sheet without a column."""
        kept = [place for place, one in enumerate(self.head) if one.lstrip("<") != name]
        return Sheet(
            self.title,
            tuple(self.head[place] for place in kept),
            [tuple(line[place] for place in kept) for line in self.body],
            self.notes,
        )


# Writing -----------------------------------------------------------------------------------------


def terminal(width: int = 140) -> Console:
    """Return the terminal as it is; a file or pipe is wide enough for the tables."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def show(sheet: Sheet, console: Console) -> None:
    """Print a sheet: its title, the table, its notes; without spare columns if it is too wide."""
    from rich.text import Text

    for name in (*sheet.spare, None):
        table = _printed(sheet)
        wide = console.measure(table, options=console.options.update(width=10_000)).maximum
        if name is None or wide <= console.width:
            break
        sheet = sheet.without(name)
    console.print(Text(sheet.title, style="bold"))
    console.print(table)
    for note in sheet.notes:
        console.print(Text(note))
    console.print()


def _printed(sheet: Sheet) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in sheet.head:
        words = name.startswith("<")
        table.add_column(
            name.lstrip("<"),
            justify="left" if words else "right",
            no_wrap=not words or name == "<" or "[" in name,  # intervals stay in one piece
            overflow="fold",
        )
    for line in sheet.body:
        table.add_row(*map(Text, line))
    return table


def text_of(several: Sequence[Sheet], width: int) -> str:
    """Return sheets as plain text of a width."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, highlight=False)
    for sheet in several:
        show(sheet, console)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


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

    marks = ["---" if name.startswith("<") else "---:" for name in sheet.head]
    head = [name.lstrip("<") for name in sheet.head]
    return [line(head), line(marks), *map(line, sheet.body)]


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# Numbers -----------------------------------------------------------------------------------------


@dataclass
class _Numbers:
    """Means over seeds, looked up by key; each is said with its deviation and number of seeds."""

    results: Results
    found: dict[tuple[Any, ...], tuple[float, float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = self.results.table
        self.expected: list[list[Any]] = self.results.about.get("expected", [])
        self.counted = bool(table["seed"].notna().any())
        for row in over_seeds(table).itertuples(index=False):
            rate, at = (None if pd.isna(x) else float(x) for x in (row.rate, row.at))
            key = (row.part, row.run, row.method, rate, at, row.metric)
            self.found[key] = (row.mean, row.std, row.count)
        self.seeds = {(run, method, rate): n for run, method, rate, n in self.expected}
        logged: dict[str, int] = self.results.about.get("without_accuracy", {})
        self.seeds |= {(run, "", None): n for run, n in logged.items()}

    def subjects(self, part: str) -> list[Subject]:
        """Return what a part is about, in order; in a comparison also what is missing."""
        there = [key[1:4] for key in self.found if key[0] == part]
        wanted = [(run, method, rate) for run, method, rate, _ in self.expected]
        return list(dict.fromkeys([*wanted, *there] if part == "accuracy" else there))

    def get(
        self, part: str, subject: Subject, metric: str, at: float | None = None
    ) -> tuple[float, float, int]:
        """Return mean, deviation and number of seeds; NaN where there is nothing."""
        return self.found.get((part, *subject, at, metric), (float("nan"), float("nan"), 0))

    def said(
        self,
        part: str,
        subject: Subject,
        metric: str,
        digits: int = 2,
        *,
        at: float | None = None,
        scale: float = 1.0,
        spread: bool = True,
    ) -> str:
        """Return a number in words."""
        mean, std, n = self.get(part, subject, metric, at)
        if not n:
            return MISSING if self.seeds.get(subject) else "-"
        text = said(mean / scale, std / scale if spread else float("nan"), digits)
        if not self.counted:
            return text
        wanted = self.seeds.get(subject, n)
        return f"{text} ({n})" if n >= wanted else f"{text} ({n} of {wanted})"

    def varies(self, part: str, subject: Subject, metric: str) -> bool:
        """Tell whether a count differs between seeds by more than rounding."""
        mean, std, _ = self.get(part, subject, metric)
        return bool(std > 1e-3 * abs(mean))


def sheets(results: Results, *, blocks: bool = True) -> Iterator[Sheet]:
    """Return all sheets that the table has numbers for.

    Args:
        results: a table and how it came about.
        blocks: also those of the tokens of single models, block by block.
    """
    numbers = _Numbers(results)
    makers = (_accuracy, _occlusion, _pruning, _tokens, _probe, _efficiency, _layers, _absent)
    for maker in makers:
        yield from maker(numbers)
    if blocks and not numbers.counted:
        for subject in numbers.subjects("tokens"):
            yield _per_block(numbers, subject)


# The sheets --------------------------------------------------------------------------------------


def _several(subjects: Sequence[Subject]) -> bool:
    return len({run for run, *_ in subjects}) > 1


def _accuracy(numbers: _Numbers) -> Iterator[Sheet]:
    subjects = numbers.subjects("accuracy")
    if not subjects:
        return
    table = numbers.results.table
    several, part = _several(subjects), "accuracy"
    there = set(select(table, part=part)["metric"])
    unit, scale = macs_unit(table)
    batches = sorted(select(table, part="speed", metric="times")["at"].unique(), reverse=True)
    head = [*["<model"] * several, "<method", "top-1 %"]
    head += ["top-5 %"] * ("top5" in there) + ["drop"] * ("drop" in there)
    head += [unit, "of dense", "tokens left"] * ("macs" in there)
    head += [f"× dense, batch {batch:g}" for batch in batches]
    head += ["images/s"] * (len(batches) == 1)
    body, marked = [], False
    for subject in subjects:
        run, method, rate = subject
        untrained = bool(numbers.get(part, subject, "untrained")[2])
        marked |= untrained
        line = [*[run] * several, label_of(method, rate) + " *" * untrained]
        line += [numbers.said(part, subject, "top1")]
        line += [numbers.said(part, subject, "top5")] * ("top5" in there)
        if "drop" in there:
            line += [numbers.said(part, subject, "drop") if method else ""]
        if "macs" in there:
            line += _cost(numbers, subject, scale)
        for batch in batches:
            line += [_times(numbers, subject, batch)]
        if len(batches) == 1:
            mean, _, n = numbers.get("speed", subject, "per_second", batches[0])
            line += [f"{mean:.4g}" if n else "-"]
        body.append(tuple(line))
    notes = []
    if marked:
        notes.append("* new parameters that nobody trained: what it keeps is arbitrary.")
    if numbers.counted:
        words = "Mean ± standard deviation over seeds of training, with their number in brackets."
        if "drop" in there:
            words += (
                " A method without options was trained with the model, one with options runs on "
                "the model as it is. Drop: points below the dense model of the same seed."
            )
        notes.append(words)
    if "measured" in there:
        notes.append("Multiply-adds and tokens are means over the images where counts differ.")
    notes += _on_speed(table) if batches else []
    images = sorted({int(n) for n in select(table, part=part, metric="images")["value"]})
    kind = _SPLITS.get(str(numbers.results.about.get("settings", {}).get("split")), "")
    title = f"Accuracy on {' or '.join(map(str, images))} {kind}images" if images else "Accuracy"
    spare = ["top-5 %", "images/s", "of dense", "tokens left", "drop"]
    spare += [f"× dense, batch {batch:g}" for batch in batches[1:]]
    yield Sheet(title, tuple(head), body, notes, tuple(spare))


def _cost(numbers: _Numbers, subject: Subject, scale: float) -> list[str]:
    mean, _, n = numbers.get("accuracy", subject, "macs")
    if not n:
        return [MISSING if numbers.seeds.get(subject) else "-"] * 3
    dense, *_ = numbers.get("accuracy", subject, "dense_macs")
    varies = numbers.varies("accuracy", subject, "macs")
    return [
        numbers.said("accuracy", subject, "macs", scale=scale, spread=varies),
        f"{mean / dense:.0%}",
        numbers.said("accuracy", subject, "tokens", 1, spread=varies),
    ]


def _times(numbers: _Numbers, subject: Subject, batch: float) -> str:
    """Return the ratio with its interval; over several seeds, with its deviation."""
    if numbers.get("speed", subject, "times", batch)[2] != 1 or numbers.counted:
        return numbers.said("speed", subject, "times", at=batch)
    ratio, low, high = (
        numbers.get("speed", subject, name, batch)[0] for name in ("times", "low", "high")
    )
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def _on_speed(table: pd.DataFrame) -> list[str]:
    speed = select(table, part="speed")
    rounds = int(select(speed, metric="rounds")["value"].min())
    trial = " (a trial, not a result)" if rounds < LEAST_ROUNDS else ""
    spread = select(speed, metric="spread")["value"].max()
    return [
        f"Speed: {rounds} interleaved rounds{trial}, median ratio with its 95 % interval; a dense "
        f"model is compared with itself. That strays by up to {spread:.0%}, and less is no "
        "difference."
    ]


def _occlusion(numbers: _Numbers) -> Iterator[Sheet]:
    subjects = numbers.subjects("occlusion")
    if not subjects:
        return
    table = select(numbers.results.table, part="occlusion")
    body = []
    for ratio in sorted(table["at"].unique()):
        line = [f"{ratio:g}"]
        for subject in subjects:
            kept, _, n = numbers.get("occlusion", subject, "kept", ratio)
            line += [f"{kept:.0f}" if n else "-"]
            line += [numbers.said("occlusion", subject, "top1", 1, at=ratio)]
        body.append(tuple(line))
    head = ["dropped", *(name for run, *_ in subjects for name in ("kept", run))]
    if len({line[1::2] for line in body if len(set(line[1::2])) > 1}) == 0:  # all keep the same
        head = [head[0], "kept", *head[2::2]]
        body = [(line[0], line[1], *line[2::2]) for line in body]
    title = "Top-1 % with patches of the image dropped at random"
    yield Sheet(title, tuple(head), body, [_over_masks(numbers, table)])


def _over_masks(numbers: _Numbers, table: pd.DataFrame) -> str:
    draws = table["draw"].nunique()
    if numbers.counted:
        return (
            f"Each seed of training is a mean over {draws} mask seeds; ± and the number in "
            "brackets are of training."
        )
    return f"Mean ± standard deviation over {draws} mask seeds."


def _pruning(numbers: _Numbers) -> Iterator[Sheet]:
    table = select(numbers.results.table, part="pruning")
    if not len(table):
        return
    kept = select(table, metric="kept", method="random")
    random = select(table, metric="top1", method="random")
    keys = ["run", "rate"]
    masks = random.groupby([*keys, "seed"], dropna=False)["value"].std().groupby(keys).mean()
    several = random["run"].nunique() > 1
    body = []
    for run, rate in dict.fromkeys(zip(random["run"], random["rate"], strict=True)):
        own = select(kept, run=run, rate=rate).drop_duplicates("at")
        line = [*[run] * several, f"{rate:g}", " ".join(f"{n:.0f}" for n in own["value"])]
        line += [numbers.said("pruning", (run, "random", rate), "top1", 1)]
        line += [f"{masks[run, rate]:.1f}"] * numbers.counted
        line += [numbers.said("pruning", (run, "attention", rate), "top1", 1)]
        body.append(tuple(line))
    blocks = {tuple(own.drop_duplicates("at")["at"]) for _, own in kept.groupby("run")}
    where = "three blocks"  # models of different depth have different ones
    if len(blocks) == 1:
        (own,) = blocks
        where = f"block{'s' * (len(own) > 1)} " + ", ".join(f"{block:g}" for block in own)
    yield Sheet(
        f"Top-1 % pruned before {where}, without training",
        (
            *["<model"] * several,
            *("rate", "kept", "random", *["± of masks"] * numbers.counted, "class attention"),
        ),
        body,
        [_over_masks(numbers, random)],
    )


def _tokens(numbers: _Numbers) -> Iterator[Sheet]:
    subjects = numbers.subjects("tokens")
    if not subjects:
        return
    several = _several(subjects)
    body = []
    for subject in subjects:
        run, method, rate = subject
        found = {
            name: numbers.said(
                *("tokens", subject, name, 1),
                scale=0.01 if name.startswith("used") else 1.0,
                spread=numbers.varies("tokens", subject, name),
            )
            for name in ("mean", "deviation", "last", "used", "used_last")
        }
        low, high = (numbers.get("tokens", subject, name)[0] for name in ("low", "high"))
        line = [*[run] * several, label_of(method, rate), found["mean"], found["deviation"]]
        line += [f"{low:.1f}-{high:.1f}", found["last"], found["used"], found["used_last"]]
        body.append(tuple(line))
    yield Sheet(
        "Tokens of an image, mean over its blocks, and patches used",
        (
            *["<model"] * several,
            *("<method", "tokens", "± of images", "5-95 %", "last block", "used %", "last %"),
        ),
        body,
        spare=("5-95 %", "± of images"),
    )


def _per_block(numbers: _Numbers, subject: Subject) -> Sheet:
    run, method, rate = subject

    def share(metric: str, block: float) -> str:
        mean, _, n = numbers.get("tokens", subject, metric, block)
        return f"{100 * mean:.1f}" if n else "-"

    table = select(numbers.results.table, part="tokens", run=run, method=method)
    body = [
        (
            f"{block:g}",
            numbers.said("tokens", subject, "tokens", 1, at=block),
            f"{share('usage', block)} ± {share('usage_deviation', block)}",
            share("reactivation", block),
            share("at_once", block),
        )
        for block in sorted(table["at"].dropna().unique())
    ]
    images = numbers.get("tokens", subject, "images")[0]
    return Sheet(
        f"{run}, {label_of(method, rate)}: tokens block by block",
        ("block", "tokens", "patches used %", "of unused, used later %", "of those, at once %"),
        body,
        [f"over {images:.0f} images; ± is the standard deviation over images"],
    )


def _probe(numbers: _Numbers) -> Iterator[Sheet]:
    """Return scores of frozen features: by epoch, or of models that were probed once."""
    table = select(numbers.results.table, part="probe")
    for metric, words in (("linear", "Linear probe"), ("knn", "Nearest neighbours")):
        own = select(table, metric=metric)
        epochs = [*sorted(own["at"].dropna().unique()), *[None] * bool(own["at"].isna().any())]
        runs = list(dict.fromkeys(own["run"]))
        body = [
            (run, *(numbers.said("probe", (run, "", None), metric, 1, at=at) for at in epochs))
            for run in runs
        ]
        if body:
            head = ["at the end" if epoch is None else f"epoch {epoch:g}" for epoch in epochs]
            yield Sheet(f"{words} on frozen features, %", ("<model", *head), body)


def _efficiency(numbers: _Numbers) -> Iterator[Sheet]:
    """Return RAUC and epochs to match, of each run over the one that it is compared with."""
    table = select(numbers.results.table, part="rauc")
    if not len(table):
        return
    like = numbers.results.about.get("like", {})
    body = []
    for run, score in dict.fromkeys(zip(table["run"], table["method"], strict=True)):
        subject = (run, score, None)
        line = [run, str(like.get(run, "")), score, numbers.said("rauc", subject, "rauc")]
        line += [_plain(numbers, subject, "mean_curves", ".2f")]
        saved = select(table, run=run, method=score, metric="saved")
        words = [f"{value:.0%}" for value in saved.sort_values("seed")["value"]]
        body.append((*line, ", ".join(words) or "-"))
    yield Sheet(
        "RAUC and epochs to match",
        ("<model", "<over", "<score", "RAUC", "of the mean curves", "<saved, seed by seed"),
        body,
        [
            "Saved: share of the epochs after which the model is as good as the other at its end.",
            *numbers.results.about.get("notes", []),
        ],
    )


def _plain(numbers: _Numbers, subject: Subject, metric: str, form: str) -> str:
    mean, _, n = numbers.get("rauc", subject, metric)
    return format(mean, form) if n else "-"


def _layers(numbers: _Numbers) -> Iterator[Sheet]:
    table = select(numbers.results.table, part="layers", metric="heterogeneity")
    layers = sorted(table["at"].unique())
    body = [
        (
            run,
            *(
                numbers.said("layers", (run, "", None), "heterogeneity", at=at)
                if numbers.get("layers", (run, "", None), "heterogeneity", at)[2]
                else ""
                for at in layers
            ),
        )
        for run in dict.fromkeys(table["run"])
    ]
    if body:
        head = ("<model", *(f"layer {layer:g}" for layer in layers))
        yield Sheet("Heterogeneity of hidden tokens by layer at the end", head, body)


def _absent(numbers: _Numbers) -> Iterator[Sheet]:
    """Return the cells of a comparison that are not done."""
    cells = numbers.results.about.get("cells", {})
    body = [(n, one["kind"], one["why"]) for n, one in cells.items() if one["kind"] != "done"]
    if body:
        title = f"Cells that are not there: {len(body)} of {len(cells)}"
        yield Sheet(title, ("<cell", "<state", "<why"), body)
