"""Cells as tasks of Ray, on this machine or on a cluster.

Ray knows what each cell needs and takes, and decides what runs where and when. Cells find each
other's models in the comparison's folder, so on a cluster every machine must see that folder, the
data and the folder that the command is started in under the same paths.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from foveate.compare.cells import Cell
from foveate.compare.launch import DONE, FAILED, SKIPPED, Outcome, Process, prepare
from foveate.compare.settings import Resources

__all__ = ["run_ray"]

_SECONDS = 10  # that a cluster may take to answer at its port


def run_ray(
    cells: Mapping[str, Cell],
    todo: Collection[str],
    ready: Collection[str],
    *,
    resources: Resources,
    address: str | None = None,
    parallel: int | None = None,
) -> Iterator[Outcome]:
    """Run cells as tasks of Ray, each after those that it needs.

    Args:
        cells: by name, each after those that it needs.
        todo: the ones to run.
        ready: the ones that are done already.
        resources: what each takes.
        address: of a cluster, or "auto"; None starts Ray on this machine and stops it afterwards.
        parallel: cells at a time on this machine; None is as many as its cores allow.
    """
    ray = _ray()
    try:
        _connect(ray, resources, address, parallel)
        task, takes = ray.remote(_run), {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
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


def _run(process: Process, *before: Outcome) -> Outcome:
    """One task. A machine that is lost makes Ray start it again elsewhere, and the cell resumes."""
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


def _connect(ray: Any, resources: Resources, address: str | None, parallel: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to report what is run
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is not None:
        try:
            _knock(address)
            ray.init(address=address, **options)
        except OSError as error:  # a ConnectionError is one
            said = " ".join(str(error).split())
            raise ValueError(f"--address {address}: no cluster of Ray answers: {said}") from error
        return
    if parallel is not None:  # Ray counts cores, so a number of cells is a number of cores
        options["num_cpus"] = max(1, round(parallel * resources.cpus))
    # "local", or an address in the environment would be taken.
    ray.init(address="local", include_dashboard=False, **options)
    there = ray.cluster_resources()
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
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
