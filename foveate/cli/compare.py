"""Compare models, methods, rates and seeds under one protocol, and write a report.

CONFIG names models to train or to open, methods to train from them, rates, seeds, and what to
measure. Every training run and every evaluation is a cell: it has a folder in --out, and runs in
processes of its own. The same command again skips finished cells and resumes interrupted ones; it
refuses a folder that was trained with another recipe. If a cell fails, the others still run, and
the failure is named at the end.

With --launcher ray the cells run as tasks of Ray. On a cluster all machines must see --out, the
data and the current folder under the same paths.

In a terminal:
  foveate compare --list
  foveate compare fashion_part --dry-run
  foveate compare fashion_part --out runs/masked
  foveate compare fashion_part "seeds=[0]" "settings=[loop.epochs=1]" --out runs/trial
  foveate compare pretraining_part --out runs/mto
  foveate compare mine.yaml --out runs/mine --only "reduced/masked/*" --parallel 2
  foveate compare mine.yaml --out /shared/mine --launcher ray --address auto
  foveate compare fashion_part --out runs/masked --report
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.cli.training import show_recipes

if TYPE_CHECKING:
    from foveate.measure.cells import Cell
    from foveate.measure.comparison import Comparison
    from foveate.measure.launch import Outcome
    from foveate.measure.state import State

__all__ = ["add_arguments", "run"]

_NAMED = 4  # cells beside the bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="name of a comparison that ships (see --list), or a YAML file",
    )
    add(
        "settings",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that differ from those of CONFIG, such as seeds=[0]",
    )
    parser.set_defaults(more="settings")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for all cells and the report (default: runs/compare-CONFIG)",
    )
    add(
        "--launcher",
        choices=("local", "ray"),
        default="local",
        help="where the cells run: as processes of this machine, or as tasks of Ray (default: "
        "local)",
    )
    add(
        "--address",
        metavar="ADDR",
        help="address of a Ray cluster, or auto to find it (default: Ray starts on this machine)",
    )
    add(
        "--parallel",
        type=int,
        metavar="N",
        help="number of cells that run at the same time (default: 1 with local, as many as fit "
        "with ray)",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="run only the cells whose names match the pattern; --dry-run shows the names. Give it "
        "more than once for cells that match any of several patterns",
    )
    add("--list", action="store_true", help="list the comparisons that ship, and stop")
    add("--dry-run", action="store_true", help="list the cells and their state, and stop")
    add(
        "--report",
        action="store_true",
        help="write the report on the finished cells, and stop",
    )


def run(args: argparse.Namespace) -> None:
    """Run what is not finished yet, and write the report."""
    if args.list:
        show_recipes("compare")
        return
    if args.config is None or "=" in args.config:
        raise ValueError("name a comparison first; foveate compare --list shows those that ship")
    if args.parallel is not None and args.parallel < 1:
        raise ValueError(f"--parallel must be at least 1, got {args.parallel}")
    if args.address is not None and args.launcher != "ray":
        raise ValueError("--address is of a cluster: it needs --launcher ray")
    from foveate import config
    from foveate.measure.cells import chosen, make_cells
    from foveate.measure.comparison import Comparison
    from foveate.measure.state import refuse, states_of

    path = config.find_recipe("compare", args.config)
    comparison = config.read(Comparison, path, args.settings)
    out = args.out or Path("runs", f"compare-{path.stem}")
    cells = make_cells(comparison, out)
    states = states_of(cells)
    if args.dry_run:
        _list(states, chosen(cells, args.only))
        return
    if args.report:
        _report(comparison, cells, states, out, path.stem)
        return
    if comparison.evaluate.speed and (args.launcher == "ray" or (args.parallel or 1) > 1):
        raise ValueError(
            "evaluate.speed: cells at the same time would disturb each other; take it with "
            "--launcher local and --parallel 1"
        )
    wanted = chosen(cells, args.only)
    refuse({name: states[name] for name in cells if name in wanted})
    from foveate.files import made_folder

    with made_folder(out):
        lost = _work(args, comparison, cells, states, wanted)
    states = states_of(cells)
    _report(comparison, cells, states, out, path.stem)
    if lost:
        first = next((o for o in lost if o.kind == "failed"), lost[0])
        failed = sum(o.kind == "failed" for o in lost)
        story = f"; the whole story is in {cells[first.name].log}" if failed else ""
        raise ValueError(
            f"cells failed: {failed}, were skipped: {len(lost) - failed}; {first.name}: "
            f"{first.why}{story}"
        )


def _work(
    args: argparse.Namespace,
    comparison: Comparison,
    cells: Mapping[str, Cell],
    states: Mapping[str, State],
    wanted: set[str],
) -> list[Outcome]:
    """Run the cells to do, and return what failed or was skipped."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from foveate.measure.launch import run_cells
    from foveate.measure.state import DONE

    ready = [name for name, state in states.items() if state.kind == DONE]
    todo = [name for name in cells if name in wanted and name not in ready]
    print(f"{len(ready)} of {len(cells)} cells are done, {len(todo)} to do")
    lost = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), transient=True) as bar:
        task = bar.add_task("", total=len(todo))

        def told(names: Sequence[str]) -> None:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            bar.update(task, description=", ".join(names[:_NAMED]) + more)

        for outcome in run_cells(
            cells,
            todo,
            ready,
            parallel=args.parallel,
            resources=comparison.resources if args.launcher == "ray" else None,
            address=args.address,
            told=told,
        ):
            minutes = f", {outcome.seconds / 60:.1f} min" if outcome.seconds else ""
            why = f": {outcome.why}" if outcome.why else ""
            words = f"{outcome.kind:8s} {outcome.name}{minutes}{why}"
            bar.console.print(words, highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)
            if outcome.kind != DONE:
                lost.append(outcome)
    return lost


def _list(states: Mapping[str, State], wanted: set[str]) -> None:
    """Print every cell with its state."""
    from collections import Counter

    from rich.table import Table

    from foveate.measure.sheets import terminal

    styles = {"done": "green", "unfinished": "yellow", "differs": "red"}
    table = Table("cell", "state", "", box=None, pad_edge=False)
    for name, state in states.items():
        if name in wanted:
            style = styles.get(state.kind, "")
            words = f"[{style}]{state.kind}[/]" if style else state.kind
            table.add_row(name, words, state.why.replace("[", "\\["))
    console = terminal()
    console.print(table)
    counts = Counter(state.kind for name, state in states.items() if name in wanted)
    console.print(f"{len(wanted)} cells: " + ", ".join(f"{n} {k}" for k, n in counts.items()))


def _report(
    comparison: Comparison,
    cells: Mapping[str, Cell],
    states: Mapping[str, State],
    out: Path,
    title: str,
) -> None:
    from foveate import machine
    from foveate.measure.gather import collect
    from foveate.measure.report import write
    from foveate.measure.sheets import sheets, show, terminal

    results = collect(comparison, cells, states, machine.command("foveate"))
    written = write(results, out, "report", title=f"Comparison: {title}", kinds=(".svg",))
    console = terminal()
    for sheet in sheets(results):
        show(sheet, console)
    for path in written:
        print(f"wrote    {path}")
