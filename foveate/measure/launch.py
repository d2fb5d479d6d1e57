"""The launcher: cells in fresh processes of this machine, or as tasks of Ray.

A crash, or memory that a cell does not give back, takes no other cell along. What needs a cell
that failed is left out, with a message; everything else goes on. A cell that wants several
processes is started by torchrun.

On a cluster of Ray every machine must see the comparison's folder, the data and the folder that the
command is started in under the same paths: cells find each other's models there.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate import config
from foveate.bench import machine
from foveate.files import write_text
from foveate.measure.cells import Cell
from foveate.measure.comparison import Resources

__all__ = [
    "DONE",
    "FAILED",
    "SKIPPED",
    "Outcome",
    "Process",
    "Told",
    "prepare",
    "run_local",
    "run_ray",
]

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
_TORCHRUN = re.compile(r"[WE]\d{4} \S+ \d+ torch/distributed/")  # how its report begins
_SECONDS = 10  # that a cluster may take to answer at its port

# Told the names of the cells that run, whenever that changes.
Told = Callable[[Sequence[str]], None]


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
        processes: that do it together.
        environment: variables that are set where they are not yet.
    """

    name: str
    file: Path
    log: Path
    place: Path
    processes: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def command(self) -> list[str]:
        """The words that start it."""
        words = ["-m", "foveate.measure.cell", str(self.file)]
        if self.processes == 1:
            return [sys.executable, *words]
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        return [sys.executable, *torchrun, f"--nproc-per-node={self.processes}", *words]

    def run(self) -> Outcome:
        """Run to the end."""
        if not (self.file.is_file() and self.place.is_dir()):
            missing = self.place if self.file.is_file() else self.file
            return Outcome(self.name, FAILED, f"{missing} is not there: the folder must be shared")
        started = time.monotonic()
        environment = {**dict(self.environment), **os.environ}
        with self.log.open("a", encoding="utf-8") as log:
            before = log.tell()
            process = subprocess.Popen(
                self.command, cwd=self.place, env=environment, stdout=log, stderr=subprocess.STDOUT
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


def prepare(cell: Cell, threads: int | None = None) -> Process:
    """Write what a cell has to do, and return what does it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.file, config.dump(cell.work))
    environment = machine.malloc_untuned("cpu")
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return Process(
        cell.name, cell.file, cell.log, Path.cwd(), cell.processes, tuple(environment.items())
    )


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
                    threads = _threads(parallel * cells[name].processes)
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


def _threads(processes: int) -> int | None:
    """Return the threads of each of several processes; None leaves that to torch."""
    return max(1, machine.physical_cores() // processes) if processes > 1 else None


def _last_words(log: Path, start: int, code: int) -> str:
    """Return the last line that a failed cell wrote; what torchrun adds to it is left out."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    ours = list(itertools.takewhile(lambda line: not _TORCHRUN.match(line), lines))
    lines = ours or lines
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1]} ({how})" if lines else how


# Ray ---------------------------------------------------------------------------------------------


def run_ray(
    cells: Mapping[str, Cell],
    todo: Collection[str],
    ready: Collection[str],
    *,
    resources: Resources,
    address: str | None = None,
    parallel: int | None = None,
) -> Iterator[Outcome]:
    """Run cells as tasks of Ray, which decides what runs where and when.

    Args:
        cells: by name, each after those that it needs.
        todo: the ones to run.
        ready: the ones that are done already.
        resources: what each process takes.
        address: of a cluster, or "auto"; None starts Ray on this machine and stops it afterwards.
        parallel: cells at a time on this machine; None is as many as its cores allow.
    """
    ray = _ray()
    most = max((cells[name].processes for name in todo), default=1)
    try:
        _connect(ray, resources, most, address, parallel)
        task = ray.remote(_task)
        names: dict[Any, str] = {}  # by what Ray will give
        promised: dict[str, Any] = {}
        for name, cell in cells.items():
            if name not in todo:
                continue
            absent = [n for n in cell.needs if n not in ready and n not in promised]
            if absent:
                yield Outcome(name, SKIPPED, f"{absent[0]} is not there")
                continue
            before = [promised[n] for n in cell.needs if n in promised]
            takes = {
                "num_cpus": resources.cpus * cell.processes,
                "num_gpus": resources.gpus * cell.processes,
            }
            promised[name] = task.options(name=name, **takes).remote(prepare(cell), *before)
            names[promised[name]] = name
        while names:
            (one,), _ = ray.wait(list(names), num_returns=1)
            name = names.pop(one)
            try:
                yield ray.get(one)
            except ray.exceptions.RayError as error:  # the machine is lost, out of memory, ...
                yield Outcome(name, FAILED, str(error).strip().splitlines()[-1])
    finally:
        ray.shutdown()


def _task(process: Process, *before: Outcome) -> Outcome:
    """Do a cell. A machine that is lost makes Ray start it again elsewhere, and it resumes."""
    for outcome in before:
        if outcome.kind != DONE:
            lost = outcome.why if outcome.kind == SKIPPED else f"{outcome.name} failed"
            return Outcome(process.name, SKIPPED, lost)
    return process.run()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError("--launcher ray needs: pip install 'foveate[cluster]'") from error


def _connect(
    ray: Any, resources: Resources, processes: int, address: str | None, parallel: int | None
) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to report what is run
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is not None:
        try:
            _knock(address)
            ray.init(address=address, **options)
        except OSError as error:  # a ConnectionError is one
            reason = " ".join(str(error).split())
            raise ValueError(f"--address {address}: no cluster of Ray answers: {reason}") from error
        return
    if parallel is not None:  # Ray counts cores, so a number of cells is a number of cores
        options["num_cpus"] = max(1, round(parallel * resources.cpus * processes))
    # "local", or an address in the environment would be taken.
    ray.init(address="local", include_dashboard=False, **options)
    there = ray.cluster_resources()
    for kind, each in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        wanted = each * processes
        if there.get(kind, 0) < wanted:  # its tasks would wait for ever
            raise ValueError(
                f"a cell takes {wanted:g} {kind}s and this machine has {there.get(kind, 0):g}: "
                "change resources, or give the --address of a cluster"
            )


def _knock(address: str) -> None:
    """See whether anybody is there; Ray itself would ask again for many minutes."""
    found = re.fullmatch(r"\[?(.+?)\]?:(\d+)", address)
    if found:
        socket.create_connection((found[1], int(found[2])), _SECONDS).close()
