"""The results of the stages of a pipeline: one table, its sheets and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foveate import config, machine
from foveate.measure import Results, frame, one, select
from foveate.measure.cells import Cell
from foveate.measure.gather import result_of, trained
from foveate.measure.sheets import Sheet
from foveate.measure.table import pd, rows
from foveate.registry import parse
from foveate.stages.recipe import Pipeline, Planned
from foveate.train.budgets import method_of_run

__all__ = ["collect", "said", "stage_sheet"]

_SPLITS = {"val": "validation", "test": "test"}
_SCORES = {"probe/linear": "linear probe", "probe/knn": "nearest neighbours"}


def collect(
    pipeline: Pipeline, stages: Sequence[Planned], evaluation: Cell, command: str | None
) -> Results:
    """Return what all stages logged, their cost, and the scores of their models."""
    judged = Results.load(evaluation.folder / "eval.json", "foveate pipeline")
    tables = []
    for stage in stages:
        logged, result = trained(stage.cell), result_of(stage.cell)
        took = {
            "minutes": result.get("minutes_of_this_process", result.get("minutes")),
            "updates": result.get("updates"),
        }
        origin = {
            "commit": result["commit"] or "unknown",
            "machine": machine.name(result["machine"]),
        }
        tables += [frame(rows("stage", took), run=stage.stage.label, **origin), logged]
    settings = judged.about["settings"]
    about = {
        **judged.about,
        "command": command,
        "settings": {name: settings.get(name) for name in ("data", "split", "limit", "precision")},
        "recipe": config.dump(pipeline),
    }
    return Results(frame(pd.concat([*tables, judged.table], ignore_index=True)), about)


def stage_sheet(results: Results, stages: Sequence[Planned]) -> Sheet:
    """Return a line for each stage: its start, its cost, and what it brought."""
    table = results.table
    body = []
    for stage in stages:
        label = stage.stage.label
        own = select(table, part="stage", run=label)
        updates = select(own, metric="updates")["value"]
        top1 = f"{_top1(table, stage):.2f}" if stage.stage.classifies else "-"
        body.append(
            (
                label,
                _what(stage),
                stage.start.stage.label if stage.start else _elsewhere(stage),
                f"{updates.iloc[0]:.0f}" if len(updates) else "-",
                f"{one(own, 'minutes'):.1f}",
                top1,
                "; ".join(_brought(table, stage, stages)),
            )
        )
    notes = [
        "Top-1 is on the images of the evaluation, of a method at its own rate. Minutes are of the "
        "last process of a stage that was resumed.",
    ]
    if any(stage.stage.job == "pretrain" for stage in stages):
        notes.append(
            "What pre-training adds to the accuracy of later stages takes a run without it to "
            "compare with: foveate compare."
        )
    head = ["stage", "what", "starts from", "updates", "minutes", "top-1 %", "brought"]
    words = ("stage", "what", "starts from", "brought")
    brought = pd.DataFrame(body, columns=head)
    return Sheet("What each stage brought", brought, words, notes, ("updates", "minutes"))


def said(stage: Planned) -> str:
    """Return the scores of a finished stage, on its validation or test images."""
    result = result_of(stage.cell)
    words = [f"{name} {result[key]:.2f} %" for key, name in _scores(result).items()]
    if stage.stage.classifies:
        words.append(f"accuracy {result['accuracy']:.2f} %")
    if not words:
        return f"{result['updates']} updates"
    images = {name: n for name, n in result["images"].items() if name in ("val", "test") and n}
    on = "".join(f" of {n} {_SPLITS[name]} images" for name, n in images.items())
    if stage.stage.job == "pretrain":  # whose images are others than those of its curve
        on = f" of validation images of {stage.recipe.probe.data}"
    return f"{', '.join(words)}{on}"


def _scores(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the readings of frozen features that a result has, with their names."""
    known = {**_SCORES, **{key.removeprefix("probe/"): name for key, name in _SCORES.items()}}
    return {key: name for key, name in known.items() if key in result}


def _what(stage: Planned) -> str:
    recipe, job = stage.recipe, stage.stage.job
    if job == "pretrain":
        return f"{job}, {recipe.method}"
    if job == "reduce":
        return f"{job}, {method_of_run(recipe, stage.cell.folder)}"
    if job == "finetune" and recipe.masking.ratios:
        return f"{job}, masked"
    return str(job)


def _elsewhere(stage: Planned) -> str:
    start = stage.recipe.model.start
    return "scratch" if start is None else str(start)


def _method(stage: Planned) -> str:
    """Return the name of the method that a stage trains; "" of a plain model."""
    if stage.stage.job != "reduce":
        return ""
    return repr(parse(method_of_run(stage.recipe, stage.cell.folder)))


def _top1(table: pd.DataFrame, stage: Planned) -> float:
    return one(table, "top1", part="accuracy", run=stage.stage.label, method=_method(stage))


def _brought(table: pd.DataFrame, stage: Planned, stages: Sequence[Planned]) -> list[str]:
    """Return what a stage changed, in words."""
    start, job, label = stage.start, stage.stage.job, stage.stage.label
    if not stage.stage.classifies:
        result = result_of(stage.cell)
        on = "test" if "test" in result["images"] else "validation"
        if stage.stage.job == "pretrain":
            on = f"{stage.recipe.probe.data} validation"
        scores = _scores(result).items()
        return [f"{name} {result[key]:.2f} % of {on} images" for key, name in scores] or ["-"]
    found = []
    if start is not None and start.stage.classifies:
        more = _top1(table, stage) - _top1(table, start)
        found.append(f"{more:+.2f} points over {start.stage.label}")
    elif start is not None:
        for probe in stages:
            linear = result_of(probe.cell).get("linear") if probe.stage.job == "probe" else None
            if probe.start is start and linear is not None:
                more = _top1(table, stage) - linear
                found.append(f"{more:+.2f} points over the linear probe of {start.stage.label}")
    if job == "reduce":
        own = select(table, run=label, method=_method(stage))
        cost = one(own, "macs", part="accuracy") / one(own, "dense_macs", part="accuracy")
        found.append(f"{cost:.0%} of the multiply-adds")
        for batch, times in select(own, part="speed", metric="times")[["at", "value"]].values:
            found.append(f"{times:.2f} x the speed at batch {batch:g}")
    hidden = select(table, part="occlusion", metric="top1", run=label)
    if len(hidden):
        most = hidden["at"].max()
        left = select(hidden, at=most)["value"].mean()
        found.append(f"{left:.1f} % with {most:.0%} of the patches dropped")
    return found or ["the first model with classes"]
