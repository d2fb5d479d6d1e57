"""Gather what the cells of a comparison found into one table."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from foveate import config, machine
from foveate.files import read_json
from foveate.measure.accuracy import drops
from foveate.measure.cells import Cell, Key, plain
from foveate.measure.comparison import CLASSLESS, Comparison, Trained
from foveate.measure.curves import by_seconds, columns, curve, seconds
from foveate.measure.dense import CALIBRATED
from foveate.measure.rauc import over_runs
from foveate.measure.state import DONE, State
from foveate.measure.table import Results, frame, pd, rows, select
from foveate.registry import parse

__all__ = ["collect", "result_of", "trained"]

_SCORES = ("probe/linear", "probe/knn")
_VALIDATED = ("accuracy", "loss", "box_ap", "mask_ap", "miou")


def collect(
    comparison: Comparison,
    cells: Mapping[str, Cell],
    states: Mapping[str, State],
    command: str,
) -> Results:
    """Return the numbers of all finished cells; what is not finished counts as missing."""
    tables = []
    about: dict[str, Any] = {}
    for name, cell in cells.items():
        if states[name].kind != DONE:
            continue
        if cell.evaluates:
            found = Results.load(cell.folder / "eval.json", "foveate compare")
            about.setdefault("settings", found.about["settings"])
            tables += [_judged(found.table, label, key) for label, key in cell.keys.items()]
        else:
            tables.append(trained(cell))
    if any(cell.work.job == "pretrain" for cell in cells.values()):
        tables += [_took(cell, cells, states) for cell in cells.values()]
    table = pd.concat(tables, ignore_index=True) if tables else frame([])
    like = _like(comparison)
    compared, notes = _efficiency(table, like)
    table = pd.concat([table, drops(table), compared], ignore_index=True)
    asked = about.get("settings", {})
    return Results(
        frame(table),
        {
            "command": command,
            "commit": machine.commit(),
            "settings": {
                "seeds of training": list(comparison.seeds),
                **{name: asked.get(name) for name in ("data", "split", "limit")},
            },
            "expected": [[*subject, n] for subject, n in _expected(comparison).items()],
            "features": {
                name: len(comparison.seeds_of(name))
                for name in comparison.models
                if comparison.entry(name).judged_by is None
            },
            "like": like,
            "notes": notes,
            "cells": {name: plain(state) for name, state in states.items()},
            "recipe": config.dump(comparison),
        },
    )


def _judged(table: pd.DataFrame, label: str, key: Key) -> pd.DataFrame:
    """Return the rows of one model of an evaluation, as the comparison calls it."""
    own = select(table, run=label)
    own = own[own["metric"] != "drop"]  # of a trained method, from the model that it began with
    if key.method is None:
        return frame(own, run=key.model, seed=key.seed)
    own = own[own["method"] != ""]  # the model under the method is not what is compared
    shifted = own["method"].str.endswith(CALIBRATED)
    method = shifted.map({True: key.method + CALIBRATED, False: key.method})
    return frame(own, run=key.model, method=method, rate=key.rate, seed=key.seed)


def trained(cell: Cell) -> pd.DataFrame:
    """Return what a run logged: scores by epoch, and layers at the end."""
    found, result = [], result_of(cell)
    if cell.work.job == "probe":
        found += rows("probe", {name: result.get(name) for name in ("linear", "knn")})
    log = cell.folder / "metrics.csv"
    if cell.work.job != "probe" and log.is_file():  # a folder may be copied without it
        found += _logged(log)
    if (cell.folder / "seconds.csv").is_file():  # runs of earlier versions have none
        for epoch, value in seconds(cell.folder).items():
            found += rows("training", {"seconds": value}, at=epoch)
    return frame(found, **_origin(cell, result))


def result_of(cell: Cell) -> dict[str, Any]:
    """Return what the run of a cell came to."""
    found: dict[str, Any] = read_json(cell.folder / "result.json", f"{cell.folder} has no result")
    return found


def _origin(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rows of a run have in common: its place in the comparison, and its origin."""
    key = cell.key
    return {
        **{"run": key.model, "method": key.method or "", "rate": key.rate, "seed": key.seed},
        "commit": result["commit"] or "unknown",
        "machine": machine.name(result["machine"]),
    }


def _took(cell: Cell, cells: Mapping[str, Cell], states: Mapping[str, State]) -> pd.DataFrame:
    """Return the minutes of training that went into a judged model: its own, and those before it.

    Before it are the models that it started from and that taught it, and what these needed.
    """
    if cell.evaluates or cell.work.job in CLASSLESS or states[cell.name].kind != DONE:
        return frame([])
    needed, waiting = {cell.name: cell}, [*cell.needs]
    while waiting:
        one = cells[waiting.pop()]
        needed[one.name] = one
        waiting += one.needs
    minutes = {}
    for name, one in needed.items():
        if one.work.job != "probe":
            if not (one.folder / "seconds.csv").is_file():  # runs of earlier versions have none
                return frame([])
            minutes[name] = [*seconds(one.folder).values()][-1] / 60
    own, whole = minutes[cell.name], sum(minutes.values())
    found = rows("time", {"before": whole - own, "own": own, "in_all": whole})
    return frame(found, **_origin(cell, result_of(cell)))


def _logged(log: Path) -> list[dict[str, Any]]:
    """Return scores by epoch, and what was measured of layers last."""
    found: list[dict[str, Any]] = []
    for name in columns(log):
        kind, _, what = name.partition("/")
        if kind == "val" and what in _VALIDATED:
            part, metric, values = "training", name, curve(log, name)
        elif name in _SCORES:
            part, metric, values = "probe", what, curve(log, name)
        elif kind == "heterogeneity" or (kind == "cosine" and what.endswith("visible")):
            # A method with two networks has their numbers in front: BootMAE's 0/05 and 1/05.
            network, _, layer = what.rpartition("/")
            part, metric = "layers", kind + f"_{network}" * (network not in ("", "0"))
            at = 0.0 if layer == "visible" else float(layer)
            values = {at: [*curve(log, name).values()][-1]}
        else:
            continue
        for at, value in values.items():
            found += rows(part, {metric: value}, at=at)
    return found


def _expected(comparison: Comparison) -> dict[tuple[str, str, str, float | None], int]:
    """Return what is evaluated once all is done, by part of the table, and for how many seeds."""
    found: dict[tuple[str, str, str, float | None], int] = {}
    for model in comparison.models:
        entry, n = comparison.entry(model), len(comparison.seeds_of(model))
        part = entry.judged_by
        if part is None:
            continue
        found[part, model, "", None] = n
        method: Trained
        for name, method in comparison.methods.items():
            for rate in (method.rates or (None,)) if model in method.starts else ():
                found[part, model, name, rate] = len(comparison.seeds_from(model, method))
        for text in entry.variants:
            reducer = parse(text)
            value = getattr(reducer, reducer.rate or "", None)
            own = float(value) if isinstance(value, (int, float)) else None
            found[part, model, repr(reducer), own] = n
    return found


def _like(comparison: Comparison) -> dict[str, str]:
    """Return the pre-trained models that are compared with another one, and with which."""
    return {
        name: comparison.root(name)
        for name in comparison.models
        if comparison.entry(name).job == "pretrain" and comparison.root(name) != name
    }


def _efficiency(table: pd.DataFrame, like: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Return RAUC and epochs to match of pre-trained models, and where they mean nothing.

    Where all runs say how long they took, also both by seconds of training: "rauc_seconds", ...
    """
    found = [frame([])]
    notes = []
    for run, base in like.items():
        own = select(table, run=run)
        shared = {column: ", ".join(own[column].unique()) for column in ("commit", "machine")}
        for score, over in product(_SCORES, ("", "_seconds")):
            metric = score.removeprefix("probe/")
            ours, theirs = (_curves(table, one, metric) for one in (base, run))
            if over:
                ours, theirs = _timed(table, base, ours), _timed(table, run, theirs)
                if not (ours and theirs):
                    continue
            values, refusals = over_runs(ours, theirs, score)
            for seed, text in refusals.items():
                which = "means of the curves" if seed is None else f"seed {seed}"
                by = ", by seconds" * bool(over)
                notes.append(f"{run} over {base}, {score}, {which}{by}: {text}.")
            for seed, known in values.items():
                numbers = {"mean_curves": known.get("rauc")} if seed is None else known
                named = {name + over: value for name, value in numbers.items()}
                lines = rows("rauc", named, run=run, method=score, seed=seed)
                found.append(frame(lines, **shared))
    return pd.concat(found, ignore_index=True), notes


def _curves(
    table: pd.DataFrame, run: str, metric: str, part: str = "probe"
) -> dict[int, dict[float, float]]:
    own = select(table, part=part, run=run, metric=metric)
    own = own[own["at"].notna()]
    return {
        int(seed): dict(zip(group["at"], group["value"], strict=True))
        for seed, group in own.groupby("seed")
    }


def _timed(
    table: pd.DataFrame, run: str, curves: Mapping[int, Mapping[float, float]]
) -> dict[int, dict[float, float]]:
    """Return curves by seconds instead of epochs; none where a run does not say what it took."""
    took = _curves(table, run, "seconds", "training")
    if not set(curves) <= set(took):
        return {}
    return {seed: by_seconds(scores, took[seed]) for seed, scores in curves.items()}
