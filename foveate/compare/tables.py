"""A comparison as tables. The number of seeds stands in brackets behind every number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from foveate.compare.numbers import MISSING, Number
from foveate.compare.results import Line, Results
from foveate.compare.state import DONE, State
from foveate.evaluate.tables import Sheet

__all__ = ["absent", "sheets"]


def sheets(results: Results) -> Iterator[Sheet]:
    """All tables, those that were not asked for left out."""
    bases = [line for line in results.lines if line.subject.method is None]
    methods = [line for line in results.lines if line.subject.method is not None]
    yield _bases(bases)
    if methods:
        yield _methods(methods)
    if results.curves:
        yield _occlusion(results)
    if results.pruning:
        yield _pruning(results)
    layered = [line for line in results.lines if line.layers]
    if layered:
        yield _tokens(layered)


def absent(states: Mapping[str, State]) -> Sheet | None:
    """The cells that are not done; None if all are."""
    body = [(name, one.kind, one.why) for name, one in states.items() if one.kind != DONE]
    if not body:
        return None
    return Sheet(
        f"Cells that are not there: {len(body)} of {len(states)}",
        ("<cell", "<state", "<why"),
        body,
    )


def _bases(lines: list[Line]) -> Sheet:
    unit, scale = _unit(lines)
    body = [
        (
            str(line.subject),
            line.top1.said(),
            line.top5.said(),
            line.macs.said(2, scale, spread=False),
            line.tokens.said(0, spread=False),
        )
        for line in lines
    ]
    notes = [
        "Mean ± standard deviation over seeds of training, with the number of seeds in brackets."
    ]
    head = ("<model", "top-1 %", "top-5 %", unit, "tokens")
    return Sheet("Base models", head, body, notes)


def _methods(lines: list[Line]) -> Sheet:
    unit, scale = _unit(lines)
    timed = any(line.times.n for line in lines)
    body = []
    for line in lines:
        subject = line.subject
        assert line.drop is not None
        body.append(
            (
                subject.model,
                str(subject.method),
                "-" if subject.rate is None else f"{subject.rate:g}",
                "yes" if subject.trained else "no",
                line.top1.said(),
                line.drop.said(),
                line.macs.said(2, scale, spread=_varies(line.macs)),
                _share(line),
                line.tokens.said(1, spread=_varies(line.tokens)),
                *[line.times.said()] * timed,
            )
        )
    notes = ["Drop: points below the base model of the same seed, the mean of the differences."]
    if timed:
        notes.append("Times dense: measured speed over the dense model, interleaved, each seed.")
    head = ("<base", "<method", "rate", "<trained", "top-1 %", "drop", unit, "of dense")
    return Sheet(
        "Methods",
        (*head, "tokens left", *["times dense"] * timed),
        body,
        notes,
    )


def _occlusion(results: Results) -> Sheet:
    curves = results.curves
    body = []
    for place, ratio in enumerate(curves[0].ratios):
        kept = next((c.kept[place] for c in curves if c.kept[place] is not None), None)
        line = [f"{ratio:g}", "-" if kept is None else str(kept)]
        body.append((*line, *(curve.top1[place].said(1) for curve in curves)))
    return Sheet(
        "Top-1 % with patches of the image dropped at random",
        ("dropped", "kept", *(curve.model for curve in curves)),
        body,
        [
            f"Each seed of training is a mean over {results.mask_seeds} mask seeds; ± and the "
            "number in brackets are of training."
        ],
    )


def _pruning(results: Results) -> Sheet:
    found = {(one.model, one.rate, one.method): one for one in results.pruning}
    body = []
    for model, rate in dict.fromkeys(key[:2] for key in found):
        random, attention = (found[model, rate, name] for name in ("random", "attention"))
        masks = random.masks.said(1, spread=False)
        body.append((model, f"{rate:g}", random.top1.said(1), masks, attention.top1.said(1)))
    return Sheet(
        "Top-1 % pruned stage by stage, without training",
        ("<model", "stage keeps", "random", "± of masks", "class attention"),
        body,
        [
            f"Random: each seed of training is a mean over {results.mask_seeds} mask seeds, whose "
            "own standard deviation is ± of masks; the other ± are of training."
        ],
    )


def _tokens(lines: list[Line]) -> Sheet:
    body = []
    for line in lines:
        found = line.layers
        cells = (found[name].said(1) for name in ("tokens", "deviation", "last", "used"))
        body.append((str(line.subject), *cells, found["used_last"].said(1)))
    return Sheet(
        "Tokens of an image, mean over its blocks, and patches used",
        ("<model", "tokens", "± of images", "in the last block", "used %", "in the last block"),
        body,
    )


def _share(line: Line) -> str:
    if line.macs.mean is None or not line.dense_macs.mean:
        return MISSING
    return f"{line.macs.mean / line.dense_macs.mean:.0%} ({line.macs.seeds})"


def _varies(number: Number) -> bool:
    """Whether a count differs from seed to seed by more than rounding."""
    return (number.std or 0) > 1e-3 * abs(number.mean or 0)


def _unit(lines: list[Line]) -> tuple[str, float]:
    most = max((line.dense_macs.mean or 0 for line in lines), default=0)
    return ("GMACs", 1e9) if most >= 1e9 else ("MMACs", 1e6)
