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
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate import config, machine
from foveate.files import write_text
from foveate.measure.cells import Cell
from foveate.measure.comparison import Resources

__all__ = ["DONE", "FAILED", "SKIPPED", "Outcome", "Told", "command_of", "run_cell", "run_cells"]

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
_TORCHRUN = re.compile(r"[WE]\d{4} \S+ \d+ torch/distributed/")  # how its report begins
_SECONDS = 10  # seconds that a cluster may take to answer at its port

# Called with the names of the running cells, whenever they change.
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


# Starts a cell; how many it takes at a time; and the exceptions that mean that a cell was lost.
Place = tuple[Callable[[Cell], Future[Outcome]], float, tuple[type[Exception], ...]]


def command_of(cell: Cell) -> list[str]:
    """Return the words that start a cell."""
    words = ["-m", "foveate.measure.cell", str(cell.file)]
    if cell.processes == 1:
        return [sys.executable, *words]
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    return [sys.executable, *torchrun, f"--nproc-per-node={cell.processes}", *words]


def run_cell(cell: Cell, place: Path, threads: int | None = None) -> Outcome:
    """Run a cell to its end in a fresh process, on whatever machine this is.

    Args:
        cell: whose file was written.
        place: the folder to start in, for paths in recipes.
        threads: of the process; None leaves that to torch.
    """
    for path in (cell.file, place):
        if not path.exists():
            return Outcome(cell.name, FAILED, f"{path} is not there: the folder must be shared")
    started = time.monotonic()
    environment = {**machine.malloc_untuned("cpu"), **os.environ}
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with cell.log.open("a", encoding="utf-8") as log:
        before = log.tell()
        process = subprocess.Popen(
            command_of(cell), cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        finally:  # an interrupted launcher leaves no cell behind
            if process.poll() is None:
                process.terminate()
                process.wait()
    seconds = time.monotonic() - started
    if code == 0:
        return Outcome(cell.name, DONE, seconds=seconds)
    return Outcome(cell.name, FAILED, _last_words(cell.log, before, code), seconds)


def run_cells(
    cells: Mapping[str, Cell],
    todo: Collection[str],
    ready: Collection[str],
    *,
    parallel: int | None = None,
    resources: Resources | None = None,
    address: str | None = None,
    told: Told | None = None,
) -> Iterator[Outcome]:
    """Run cells, each as soon as those that it needs are done.

    Args:
        cells: by name, each after those that it needs.
        todo: the ones to run.
        ready: the ones that are done already.
        parallel: cells at a time on this machine; None is one, or with Ray as many as fit.
        resources: what each process takes of Ray, which then decides what runs where and when.
            None starts cells without Ray; they share the processor's cores.
        address: of a cluster of Ray, or "auto"; None starts Ray here and stops it afterwards.
        told: told which cells run, or were handed to Ray.
    """
    waiting = [name for name in cells if name in todo]
    done, lost = set(ready), dict[str, str]()
    running: dict[Future[Outcome], str] = {}
    most = max((cells[name].processes for name in todo), default=1)
    place = _here(parallel or 1) if resources is None else _ray(resources, most, address, parallel)
    with place as (start, room, losses):
        while waiting or running:
            for name in list(waiting):
                cell = cells[name]
                coming = {*done, *waiting, *running.values()}
                lacking = [need for need in cell.needs if need not in coming]
                if lacking:
                    waiting.remove(name)
                    lost[name] = lost.get(lacking[0], f"{lacking[0]} is not there")
                    yield Outcome(name, SKIPPED, lost[name])
                elif done.issuperset(cell.needs) and len(running) < room:
                    waiting.remove(name)
                    cell.folder.mkdir(parents=True, exist_ok=True)
                    write_text(cell.file, config.dump(cell.work))
                    running[start(cell)] = name
                    if told is not None:
                        told(tuple(running.values()))
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                try:
                    outcome = future.result()
                except losses as error:
                    outcome = Outcome(name, FAILED, str(error).strip().splitlines()[-1])
                if outcome.kind == DONE:
                    done.add(name)
                else:
                    lost[name] = f"{name} failed"
                yield outcome


def _last_words(log: Path, start: int, code: int) -> str:
    """Return the last line that a failed cell wrote; what torchrun adds to it is left out."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    ours = list(itertools.takewhile(lambda line: not _TORCHRUN.match(line), lines))
    lines = ours or lines
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1]} ({how})" if lines else how


@contextmanager
def _here(parallel: int) -> Iterator[Place]:
    """Start cells in processes of this machine."""

    def start(cell: Cell) -> Future[Outcome]:
        sharing = parallel * cell.processes
        threads = max(1, machine.physical_cores() // sharing) if sharing > 1 else None
        return pool.submit(run_cell, cell, Path.cwd(), threads)

    with ThreadPoolExecutor(parallel) as pool:
        yield start, parallel, ()


@contextmanager
def _ray(
    resources: Resources, processes: int, address: str | None, parallel: int | None
) -> Iterator[Place]:
    """Hand cells to Ray as tasks; it starts the task of a machine that is lost again elsewhere."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ValueError("--launcher ray needs: pip install 'foveate[cluster]'") from error

    def start(cell: Cell) -> Any:
        takes = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        takes = {kind: each * cell.processes for kind, each in takes.items()}
        return task.options(name=cell.name, **takes).remote(cell, Path.cwd()).future()

    try:
        _connect(ray, resources, processes, address, parallel)
        task = ray.remote(run_cell)
        yield start, math.inf, (ray.exceptions.RayError,)
    finally:
        ray.shutdown()


def _connect(
    ray: Any, resources: Resources, processes: int, address: str | None, parallel: int | None
) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # do not report usage
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is not None:
        try:
            found = re.fullmatch(r"\[?(.+?)\]?:(\d+)", address)
            if found:  # check that the cluster answers; Ray itself would retry for many minutes
                socket.create_connection((found[1], int(found[2])), _SECONDS).close()
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
