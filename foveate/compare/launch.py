"""Cells one after another, or a few at a time, each in a fresh process.

A crash, or memory that a cell does not give back, takes no other cell along. What needs a cell
that failed is left out, and said so; everything else goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from foveate import config
from foveate.bench import machine
from foveate.compare.cells import Cell
from foveate.files import write_text

__all__ = ["DONE", "FAILED", "SKIPPED", "Outcome", "Process", "Told", "prepare", "run_local"]

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        name: of the cell.
        kind: "done", "failed" or "skipped".
        why: of what was not done.
        seconds: that it took.
    """

    name: str
    kind: str
    why: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Process:
    """What starts a cell, wherever it runs: plain values that can be sent to another machine.

    Attributes:
        name: of the cell.
        file: that says what to do.
        log: where output goes.
        place: the folder to start in, for paths in recipes.
        environment: variables that are set where they are not yet.
    """

    name: str
    file: Path
    log: Path
    place: Path
    environment: tuple[tuple[str, str], ...] = ()

    def run(self) -> Outcome:
        """Run to the end."""
        if not (self.file.is_file() and self.place.is_dir()):
            missing = self.place if self.file.is_file() else self.file
            return Outcome(self.name, FAILED, f"{missing} is not there: the folder must be shared")
        started = time.monotonic()
        environment = {**dict(self.environment), **os.environ}
        command = [sys.executable, "-m", "foveate.compare.cell", str(self.file)]
        with self.log.open("a", encoding="utf-8") as log:
            before = log.tell()
            process = subprocess.Popen(
                command, cwd=self.place, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait()
            finally:  # an interrupted launcher leaves no cell behind
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        seconds = time.monotonic() - started
        if code == 0:
            return Outcome(self.name, DONE, seconds=seconds)
        return Outcome(self.name, FAILED, _last_words(self.log, before, code), seconds)


# Told the names of the cells that run, whenever that changes.
Told = Callable[[Sequence[str]], None]


def prepare(cell: Cell, threads: int | None = None) -> Process:
    """Write what a cell has to do, and give what does it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.file, config.dump(cell.work))
    environment = machine.malloc_untuned("cpu")
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return Process(cell.name, cell.file, cell.log, Path.cwd(), tuple(environment.items()))


def run_local(
    cells: Mapping[str, Cell],
    todo: Collection[str],
    ready: Collection[str],
    *,
    parallel: int = 1,
    told: Told | None = None,
) -> Iterator[Outcome]:
    """Run cells on this machine, each as soon as those that it needs are done.

    Args:
        cells: by name, each after those that it needs.
        todo: the ones to run.
        ready: the ones that are done already.
        parallel: cells at a time; they share the processor's cores.
        told: told which cells run.
    """
    threads = max(1, machine.physical_cores() // parallel) if parallel > 1 else None
    waiting = [name for name in cells if name in todo]
    done, lost = set(ready), dict[str, str]()
    running: dict[Future[Outcome], str] = {}
    with ThreadPoolExecutor(parallel) as pool:
        while waiting or running:
            for name in list(waiting):
                needs = cells[name].needs
                lacking = [n for n in needs if n not in done and n not in waiting]
                lacking = [n for n in lacking if n not in running.values()]
                if lacking:
                    waiting.remove(name)
                    lost[name] = lost.get(lacking[0], f"{lacking[0]} is not there")
                    yield Outcome(name, SKIPPED, lost[name])
                elif len(running) < parallel and all(n in done for n in needs):
                    waiting.remove(name)
                    running[pool.submit(prepare(cells[name], threads).run)] = name
                    if told is not None:
                        told(tuple(running.values()))
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name, outcome = running.pop(future), future.result()
                if outcome.kind == DONE:
                    done.add(name)
                else:
                    lost[name] = f"{name} failed"
                yield outcome


def _last_words(log: Path, start: int, code: int) -> str:
    """The last line that a failed cell wrote."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1]} ({how})" if lines else how
