"""Run a pipeline: skip finished stages, resume an interrupted one, and write a report at the end.

OUT/pipeline.yaml                     what was asked for
OUT/1-pretrain, OUT/2-finetune, ...   the run folders of the stages
OUT/evaluation                        what was measured of their models
OUT/report.md, .csv, .json, pictures  accuracy, cost and speed, and what each stage brought
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from foveate import config
from foveate.bench.progress import progress_bar
from foveate.files import write_text
from foveate.measure import Results, write
from foveate.measure.cell import alone, judge, train
from foveate.measure.cells import Cell
from foveate.measure.sheets import Sheet
from foveate.measure.state import DONE, TODO, UNFINISHED, State, refuse, states_of
from foveate.stages.plan import EVALUATION, plan
from foveate.stages.recipe import Pipeline, Planned
from foveate.stages.report import collect, said, stage_sheet

__all__ = ["run"]

_log = logging.getLogger(__name__)
_FILE = "pipeline.yaml"


def run(
    pipeline: Pipeline,
    out: Path,
    *,
    command: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = _log.info,
) -> tuple[Results, Sheet] | None:
    """Run what is not finished yet, and write the report.

    Args:
        pipeline: the pipeline to run.
        out: folder of all stages; made if missing.
        command: command that was typed, for the record.
        progress: show progress bars.
        say: called with progress messages and results.

    Returns:
        The table, and what each stage brought as a sheet; None in other processes than the first
        of those that train together.
    """
    stages, evaluation = plan(pipeline, out)
    cells = {cell.name: cell for cell in (*(one.cell for one in stages), evaluation)}
    states = states_of(cells)
    _refuse(states, cells)
    first = _first()
    if first:
        out.mkdir(parents=True, exist_ok=True)
    with alone(out / _FILE) if first else nullcontext():
        if first:
            write_text(out / _FILE, config.dump(pipeline))
            say(_first_screen(stages, states, evaluation, out))
        for number, one in enumerate(stages, start=1):
            _stage(one, states[one.cell.name], f"{number} of {len(stages)}", progress, say)
        if not first:
            return None
        if states_of(cells)[EVALUATION].kind != DONE:
            say("\nevaluation of all models with classes")
            evaluation.folder.mkdir(exist_ok=True)
            with progress_bar() if progress else nullcontext() as told:
                judge(evaluation.work, evaluation.folder, command or "foveate.pipeline", told)
        results = collect(pipeline, stages, evaluation, command)
        sheet = stage_sheet(results, stages)
        title = f"Pipeline: {out.name}"
        for path in write(results, out, "report", title=title, kinds=(".svg",), first=[sheet]):
            say(f"wrote    {path}")
    return results, sheet


def _stage(
    one: Planned, state: State, place: str, progress: bool, say: Callable[[str], None]
) -> None:
    """Run or resume a stage, and report its result."""
    first, name = _first(), one.stage.label
    if state.kind != DONE:
        if first:
            going = f", going on from {state.why}" if state.kind == UNFINISHED else ""
            say(f"\nstage    {name}, {place}{going}")
        probes = one.stage.job == "probe"  # which the first process does alone
        if first or not probes:
            one.cell.folder.mkdir(parents=True, exist_ok=True)
            try:
                train(one.cell.work, one.cell.folder, progress=progress, say=say)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and not probes:  # the next stage opens what the first process exports
            torch.distributed.barrier()
    if first:
        say(f"{'skipped' if state.kind == DONE else 'done':8} {name}: {said(one)}")


def _first() -> bool:
    """Tell whether this is the first or only one of the processes that train together."""
    return not rank_zero_only.rank  # type: ignore[attr-defined]


def _refuse(states: Mapping[str, State], cells: Mapping[str, Cell]) -> None:
    """Refuse stages trained with other settings, or from a model that is gone."""
    refuse(states)
    for name, cell in cells.items():
        gone = [need for need in cell.needs if states[need].kind != DONE]
        if gone and states[name].kind in (DONE, UNFINISHED):
            raise ValueError(
                f"{cell.folder} was trained from {gone[0]}, which is not finished: move it away to "
                "train both anew"
            )


def _first_screen(
    stages: Sequence[Planned], states: Mapping[str, State], evaluation: Cell, out: Path
) -> str:
    """Return the lines that say what will run, and how far each stage is."""
    lines: list[str] = []
    for one in stages:
        state = states[one.cell.name]
        why = f", {state.why}" if state.why and state.kind != TODO else ""
        what = one.stage.job + (f" {one.stage.recipe}" if one.stage.recipe else "")
        lines.append(f"{'' if lines else 'stages':8} {one.stage.label}: {what} ({state.kind}{why})")
    asked = evaluation.work.asked
    split = f" ({asked['split']})" if asked["split"] else ""
    lines.append(f"judged   on {asked['data']}{split}: {', '.join(evaluation.work.models)}")
    lines.append(f"folder   {out}")
    return "\n".join(lines)
