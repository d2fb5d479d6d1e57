"""Gather what the cells of a comparison found, from the files beside the models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from foveate.compare.cells import Cell, Key
from foveate.compare.numbers import Number, Seed
from foveate.compare.results import Curve, Line, Pruning, Results, Subject
from foveate.compare.settings import Comparison, Trained
from foveate.compare.state import DONE, State
from foveate.evaluate import DENSE, Entry, Report, Row
from foveate.files import read_json
from foveate.registry import parse

__all__ = ["collect"]


def collect(
    comparison: Comparison, cells: Mapping[str, Cell], states: Mapping[str, State]
) -> Results:
    """Gather what the finished cells found; what is not finished counts as missing."""
    found = Results(mask_seeds=comparison.evaluate.mask_seeds)
    gather = _Gather(comparison, cells, states, found)
    for model in comparison.models:
        gather.base(model)
    name: str
    method: Trained
    for name, method in comparison.methods.items():
        for start in method.starts:
            for rate in method.rates or (None,):
                gather.trained(Subject(start, name, rate))
    if comparison.untrained is not None:
        for start in comparison.untrained.starts:
            for text in comparison.untrained.written():
                gather.untrained(start, text)
    return found


class _Gather:
    """Reads each file once, and makes numbers over seeds of them."""

    def __init__(
        self,
        comparison: Comparison,
        cells: Mapping[str, Cell],
        states: Mapping[str, State],
        found: Results,
    ) -> None:
        self.comparison, self.found = comparison, found
        self.entries: dict[Key, Entry] = {}
        self.folders: dict[Key, Path] = {}
        for name, cell in cells.items():
            if states[name].kind != DONE:
                continue
            if cell.evaluates:
                report = Report.load(cell.folder / "eval.json")
                self.entries[cell.key] = report.entries[0]
                self._seen(report.machine, report.commit)
            else:
                result = read_json(cell.folder / "result.json", f"{cell.folder} has no result")
                self.folders[cell.key] = cell.folder
                self._seen(result["machine"], result["commit"])

    def _seen(self, machine: Mapping[str, Any], commit: str | None) -> None:
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
        words = f"{where}; torch {machine['torch']}, timm {machine['timm']}"
        for table, one in ((self.found.machines, words), (self.found.commits, commit or "unknown")):
            table[one] = table.get(one, 0) + 1

    # Lines -------------------------------------------------------------------------------------

    def base(self, model: str) -> None:
        """A base model: accuracy, occlusion, pruning."""
        subject, keys = Subject(model), self._keys(model)
        self._line(subject, keys, lambda entry: entry.rows.get(DENSE))
        if self.comparison.pruned(model):
            self._curve(model, keys)
            self._pruning(model, keys)

    def trained(self, subject: Subject) -> None:
        """A method that was trained from a base model."""
        keys: dict[Seed, Key] = {
            seed: Key(subject.model, subject.method, subject.rate, seed)
            for seed in self.comparison.seeds
        }
        self._line(
            subject,
            keys,
            lambda entry: next((r for name, r in entry.rows.items() if name != DENSE), None),
        )

    def untrained(self, model: str, text: str) -> None:
        """A method on a base model as it is."""
        reducer = parse(text)
        name = repr(reducer)
        rate = getattr(reducer, reducer.rate or "", None)
        rate = float(rate) if isinstance(rate, (int, float)) else None
        subject = Subject(model, text, rate, trained=False)
        self._line(subject, self._keys(model), lambda entry: entry.rows.get(name))

    def _keys(self, model: str) -> dict[Seed, Key]:
        seeds: tuple[Seed, ...] = self.comparison.seeds
        if self.comparison.models[model].shared:
            seeds = (None,)
        return {seed: Key(model, seed=seed) for seed in seeds}

    def _line(
        self, subject: Subject, keys: Mapping[Seed, Key], row_of: Callable[[Entry], Row | None]
    ) -> None:
        rows: dict[Seed, Row] = {}
        entries: dict[Seed, Entry] = {}
        for seed, key in keys.items():
            entry = self.entries.get(key)
            row = None if entry is None else row_of(entry)
            if entry is not None and row is not None:
                rows[seed], entries[seed] = row, entry

        def number(of: Callable[[Row], float | None]) -> Number:
            return Number.of((s, of(rows[s]) if s in rows else None) for s in keys)

        top1 = number(lambda row: row.accuracy.top1)
        if subject.trained:
            runs = {s: self.folders[k] for s, k in keys.items() if k in self.folders}
            if runs:
                self.found.runs[subject] = runs
        base = None if subject.method is None else self.found.line(Subject(subject.model))
        drop = None if base is None else top1.minus(base.top1).negative()
        speeds = {
            seed: entries[seed].speeds[row.name].ratio
            for seed, row in rows.items()
            if row.name in entries[seed].speeds
        }
        line = Line(
            subject,
            top1,
            number(lambda row: row.accuracy.top5),
            number(lambda row: row.macs),
            number(lambda row: row.dense_macs),
            number(lambda row: row.tokens),
            Number.of((seed, speeds.get(seed)) for seed in keys),
            drop,
            _layers(keys, rows, entries),
        )
        self.found.lines.append(line)
        for seed, value in top1.values.items():
            row = rows.get(seed)
            self._raw(
                "accuracy",
                subject,
                seed,
                value,
                top5=row.accuracy.top5 if row else None,
                drop=drop.values.get(seed) if drop else None,
                macs=row.macs if row else None,
                dense_macs=row.dense_macs if row else None,
                tokens_last_block=row.tokens if row else None,
                times_dense_speed=speeds.get(seed),
                images=row.accuracy.images if row else None,
            )

    def _curve(self, model: str, keys: Mapping[Seed, Key]) -> None:
        ratios = tuple(sorted(set(self.comparison.evaluate.occlusion)))
        if not ratios:
            return
        curves = {s: self.entries[k].occlusion for s, k in keys.items() if k in self.entries}
        kept: list[int | None] = []
        numbers = []
        for place, ratio in enumerate(ratios):
            values: dict[Seed, float] = {}
            count = None
            for seed, curve in curves.items():
                if curve is None:
                    continue
                values[seed], count = curve.top1[place].mean, curve.kept[place]
                drawn = 1 if count == curve.patches else None  # nothing dropped: masks are alike
                for mask, one in zip(curve.seeds[:drawn], curve.top1[place].values, strict=False):
                    self._raw("occlusion", Subject(model), seed, one, ratio=ratio, mask_seed=mask)
            kept.append(count)
            numbers.append(Number.of((seed, values.get(seed)) for seed in keys))
        self.found.curves.append(Curve(model, ratios, tuple(kept), tuple(numbers)))

    def _pruning(self, model: str, keys: Mapping[Seed, Key]) -> None:
        cells = {s: self.entries[k].pruning for s, k in keys.items() if k in self.entries}
        for rate in sorted(set(self.comparison.evaluate.pruning)):
            for method in ("random", "attention"):
                values: dict[Seed, float] = {}
                spreads: dict[Seed, float | None] = {}
                for seed, several in cells.items():
                    for one in several:
                        if (one.method, one.rate) != (method, rate):
                            continue
                        values[seed], spreads[seed] = one.top1.mean, one.top1.spread
                        subject = Subject(model, method, rate, trained=False)
                        masks: Iterable[int | None] = one.seeds or (None,)
                        for mask, value in zip(masks, one.top1.values, strict=True):
                            self._raw(
                                "pruning", subject, seed, value, macs=one.macs, mask_seed=mask
                            )
                self.found.pruning.append(
                    Pruning(
                        model,
                        method,
                        rate,
                        Number.of((seed, values.get(seed)) for seed in keys),
                        Number.of((seed, spreads.get(seed)) for seed in keys),
                    )
                )

    def _raw(self, part: str, subject: Subject, seed: Seed, top1: float, **more: Any) -> None:
        self.found.raw.append(
            {
                "part": part,
                "model": subject.model,
                "method": subject.method,
                "rate": subject.rate,
                "trained": int(subject.trained),
                "seed": "all" if seed is None else seed,
                "top1": top1,
                **more,
            }
        )


def _layers(
    keys: Mapping[Seed, Key], rows: Mapping[Seed, Row], entries: Mapping[Seed, Entry]
) -> dict[str, Number]:
    """Statistics of tokens over the blocks, where they were gathered."""
    found = {
        seed: entries[seed].statistics[row.name]
        for seed, row in rows.items()
        if row.name in entries[seed].statistics
    }
    if not found:
        return {}
    quantities: dict[str, Callable[[Any], float]] = {
        "tokens": lambda one: one.tokens_per_image.mean,
        "deviation": lambda one: one.tokens_per_image.deviation,
        "last": lambda one: one.last_tokens.mean,
        "used": lambda one: 100 * sum(one.usage) / len(one.usage),
        "used_last": lambda one: 100 * one.usage[-1],
    }
    return {
        name: Number.of((seed, of(found[seed]) if seed in found else None) for seed in keys)
        for name, of in quantities.items()
    }
