"""The cells of a comparison: what each trains or evaluates, in which folder, after which others.

models/<name>/seed<k>/                    a model: the run folder of its job
reduced/<model>/<method>-<rate>/seed<k>/  a method trained from it: another one
models/<name>/                            evaluation of a model that was opened, one for all seeds
together/                                 evaluation of all models at once, if that is asked for

Beside each model lie the files of its cells: what to do (cell.yaml, eval.yaml), what was printed
(log.txt, eval-log.txt) and what was measured (eval.json, eval.csv).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from foveate import config
from foveate.convert import SHIPPED
from foveate.data import final_images
from foveate.measure.comparison import (
    CLASSLESS,
    DENSE_JOBS,
    SEED,
    Comparison,
    Entry,
    Trained,
    at_rate,
    start_of,
)
from foveate.mim.teacher import check_keeps_teacher
from foveate.mim.weights import TEACHER_FILE

__all__ = ["EVALUATE", "Cell", "Key", "Work", "chosen", "make_cells", "plain", "read_work"]

EVALUATE = "evaluate"

_TEACHERS = {"finetune": "distill.teacher", "reduce": "teacher"}  # settings by job


@dataclass(frozen=True)
class Key:
    """The model that a cell trains or evaluates.

    Attributes:
        model: name of the model.
        method: name of the method that is trained from it; None is the model itself.
        rate: rate of the method.
        seed: seed of the training; None if all seeds share the model.
    """

    model: str
    method: str | None = None
    rate: float | None = None
    seed: int | None = None

    @property
    def folder(self) -> str:
        """Return the folder of the model, relative to that of the comparison."""
        end = "" if self.seed is None else f"/seed{self.seed}"
        if self.method is None:
            return f"models/{self.model}{end}"
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"reduced/{self.model}/{self.method}{rate}{end}"


@dataclass(kw_only=True)
class Work:
    """The work of one cell, as its file describes it.

    Attributes:
        job: job of a training, or "evaluate".
        recipe: complete recipe of a training.
        models: models of an evaluation: files or folders, by label.
        asked: plan of an evaluation, as ``foveate.measure.Plan`` takes it.
        device: device of an evaluation; "auto" takes a GPU if there is one.
        workers: number of processes that read images in an evaluation.
    """

    job: str
    recipe: dict[str, Any] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    workers: int = 0

    @property
    def settings(self) -> Any:
        """Return the recipe of a training."""
        return config.parse(self.recipe_class, self.recipe, (), "recipe")

    @property
    def recipe_class(self) -> type:
        """Return the class of the recipe of a training."""
        return config.recipe_class(self.job)


@dataclass(frozen=True)
class Cell:
    """One training or one evaluation.

    Attributes:
        keys: the models, by their labels in an evaluation; a training has one.
        work: what the cell does.
        name: name for people and for ``--only``.
        folder: folder of the cell.
        needs: names of the cells that must be finished before.
        processes: number of processes that run the cell together.
    """

    keys: Mapping[str, Key]
    work: Work
    name: str
    folder: Path
    needs: tuple[str, ...] = ()
    processes: int = 1

    @property
    def key(self) -> Key:
        """Return the key of the model of a training."""
        (found,) = self.keys.values()
        return found

    @property
    def evaluates(self) -> bool:
        """Tell whether the cell is an evaluation."""
        return self.work.job == EVALUATE

    @property
    def file(self) -> Path:
        """Return the file that tells the process of the cell what to do."""
        return self.folder / ("eval.yaml" if self.evaluates else "cell.yaml")

    @property
    def log(self) -> Path:
        """Return the log file of that process."""
        return self.folder / ("eval-log.txt" if self.evaluates else "log.txt")


def make_cells(comparison: Comparison, out: Path) -> dict[str, Cell]:
    """Return all cells by name, each after those that it needs. Recipes are read and checked."""
    out = out.resolve()
    trainings = [*_of_models(comparison, out), *_of_methods(comparison, out)]
    judged = [cell for cell in trainings if cell.work.job not in CLASSLESS]
    data = _one_data(comparison, judged)
    found: dict[str, Cell] = {}
    for cell in trainings:
        if cell.name in found:
            raise ValueError(f"two trainings would lie in {cell.name}: rename a method")
        _check_start(cell, found)
        # A training without a job is an opened model, of which there is only an evaluation.
        if cell.work.job:
            found[cell.name] = cell
        if cell in judged and not comparison.evaluate.together:
            own = _evaluation(comparison, [cell], data, cell.name, cell.folder)
            found[own.name] = own
    if judged and comparison.evaluate.together:
        whole = _evaluation(comparison, judged, data, "together", out / "together")
        found[whole.name] = whole
    return found


def chosen(cells: Mapping[str, Cell], patterns: Sequence[str]) -> set[str]:
    """Return the names of the cells that match any of the patterns; without one, all names."""
    if not patterns:
        return set(cells)
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in cells if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"--only {pattern} selects no cell; one is called {next(iter(cells))}")
        found |= matching
    return found


def read_work(path: Path) -> Work:
    """Return the work that a cell's file holds."""
    return config.read(Work, path)


def plain(settings: Any) -> dict[str, Any]:
    """Return a dataclass as JSON would have it."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return found


def _check_start(cell: Cell, earlier: Mapping[str, Cell]) -> None:
    """Refuse to start from the teacher of what has none."""
    start = Path(cell.work.recipe.get("model", {}).get("start") or "")
    if start.name == TEACHER_FILE:
        for name in cell.needs:
            if start.parent == earlier[name].folder:
                check_keeps_teacher(name, earlier[name].work.recipe.get("method"))


def _of_models(comparison: Comparison, out: Path) -> Iterator[Cell]:
    """Return the trainings of models; those of opened ones have no job."""
    for name in comparison.models:
        entry = comparison.entry(name)
        for seed in comparison.seeds_of(name):
            key = Key(name, seed=seed)
            if entry.open is not None:
                work = Work(job="", models={name: _opened(entry, seed)})
                yield Cell({name: key}, work, key.folder, out / key.folder)
            else:
                assert entry.job is not None and entry.recipe is not None
                yield _training(
                    comparison, out, key, entry.job, entry.recipe, entry.settings, entry.processes
                )


def _of_methods(comparison: Comparison, out: Path) -> Iterator[Cell]:
    method: Trained
    for name, method in comparison.methods.items():
        for start in method.starts:
            for rate in method.rates or (None,):
                text = method.method if rate is None else at_rate(method.method, rate)
                own = (f"method={json.dumps(text)}", *method.settings)
                for seed in comparison.seeds_from(start, method):
                    key = Key(start, name, rate, seed)
                    job = comparison.job_from(start)
                    yield _training(comparison, out, key, job, method.recipe, own, method.processes)


def _training(
    comparison: Comparison,
    out: Path,
    key: Key,
    job: str,
    recipe: str,
    own: Sequence[str],
    processes: int | None,
) -> Cell:
    """Return a training, from the models of the same seed that come before it."""
    # Settings that are models, and which models of the comparison those are.
    others: dict[str, str | None] = {"model.start": key.model}
    file = ""
    if key.method is None:
        entry = comparison.entry(key.model)
        start, file = (None, "") if entry.start is None else start_of(entry.start)
        others = {"model.start": start}
        if entry.teacher is not None:
            if job not in _TEACHERS:
                raise ValueError(f"{key.folder}: a model of job={job} has no teacher")
            others[_TEACHERS[job]] = entry.teacher
    given, needs = [], []
    for setting, other in others.items():
        if other is None:
            continue
        base = comparison.entry(other)
        if base.open is not None:
            path = _opened(base, key.seed)
        elif not base.shared and key.seed not in comparison.seeds_of(other):
            raise ValueError(f"{key.folder} needs {other}, which has no seed {key.seed}")
        else:
            needs.append(Key(other, seed=None if base.shared else key.seed).folder)
            path = str(out / needs[-1])
        if file and setting == "model.start":
            path += f"/{file}"
            if base.open is not None and not Path(path).is_file():
                raise ValueError(f"{key.folder} starts from the teacher of {other}: no {path}")
        given.append(f"{setting}={json.dumps(path)}")
    probes = job == "probe"
    settings = [*([] if probes else comparison.settings), *own]
    seed = comparison.seed_of(key.seed)
    settings.append(f"seed={seed}" if probes else f"loop.seed={seed}")
    settings += given
    try:
        read: Any = config.read(config.recipe_class(job), config.find_recipe(job, recipe), settings)
    except ValueError as error:
        raise ValueError(f"{key.folder}: {error}") from None
    together = 1 if probes else processes or comparison.resources.processes
    work = Work(job=job, recipe=plain(read))
    return Cell({"": key}, work, key.folder, out / key.folder, tuple(needs), together)


def _opened(entry: Entry, seed: int | None) -> str:
    """Return the file or folder of a model that is opened, found from anywhere."""
    text = str(entry.open).replace(SEED, str(seed))
    path = Path(text).expanduser()
    if text in SHIPPED:
        return text
    if not path.exists():
        raise ValueError(f"{text} does not exist; open names a checkpoint or folder")
    return str(path.resolve())


def _one_data(comparison: Comparison, judged: Sequence[Cell]) -> dict[str, Any]:
    """Return what everything is evaluated on: one protocol means the same images.

    They are the test images of the recipes, or those for validation where there are none.
    """
    limit = comparison.evaluate.limit
    if comparison.data is not None:
        return {"data": comparison.data, "limit": limit}
    final = cache(final_images)  # it opens the data, which most recipes share
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for cell in judged:
        data = cell.work.recipe["data"]
        spec, split = final(data["train"], data["val"], data["test"])
        own = {"data": spec, "split": split, "limit": limit or data["val_limit"]}
        if split == "val":
            own |= {"val_share": data["val_share"], "split_seed": data["split_seed"]}
        found.setdefault(json.dumps(own), (own, cell.name))
    if len(found) > 1:
        (one, first), (other, second), *_ = found.values()
        raise ValueError(
            f"the recipes evaluate on different images, {first} on {_words(one)} and {second} on "
            f"{_words(other)}: data, and evaluate.limit, say what all are measured on"
        )
    return next(iter(found.values()))[0] if found else {}


def _words(own: Mapping[str, Any]) -> str:
    words = own["data"] if own["split"] is None else f"{own['data']} ({own['split']})"
    return words if own["limit"] is None else f"{own['limit']} of {words}"


def _evaluation(
    comparison: Comparison, cells: Sequence[Cell], data: Mapping[str, Any], name: str, folder: Path
) -> Cell:
    """Return the evaluation of some models."""
    asked = comparison.evaluate
    keys, models, methods = {}, {}, {}
    for cell in cells:
        key = cell.key
        label = key.folder if asked.together else "model"
        keys[label] = key
        models[label] = str(cell.folder) if cell.work.job else cell.work.models[key.model]
        methods[label] = () if key.method is not None else comparison.entry(key.model).variants
    only = [k for k, key in keys.items() if key.method is None and comparison.masked(key.model)]
    plan = asked.plan(**data, methods=methods, only=only)
    dense = [cell.name for cell in cells if comparison.job_from(cell.key.model) in DENSE_JOBS]
    if dense:
        for part in ("occlusion", "pruning"):
            if getattr(asked, part):
                raise ValueError(f"evaluate.{part} is for classifiers, which {dense[0]} is not")
        plan = dataclasses.replace(plan, statistics=False)
    elif not only:  # so that evaluating other models changes nothing here
        plan = dataclasses.replace(plan, occlusion=(), pruning=())
    work = Work(
        job=EVALUATE,
        models=models,
        asked=plain(plan),
        device=asked.device,
        workers=asked.workers,
    )
    for one in ("device", "workers"):
        del work.asked[one]
    needs = tuple(cell.name for cell in cells if cell.work.job)
    return Cell(keys, work, f"{name}/eval", folder, needs)
