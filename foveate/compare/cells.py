"""The cells of a comparison: what is trained or evaluated, where, and after what.

models/<name>/seed<k>/                    a base model: a run folder of ``foveate.train``
reduced/<model>/<method>-<rate>/seed<k>/  a method trained from it: another one
models/<name>/                            evaluation of a model that was opened, one for all seeds

Beside each model lie the files of its cells: what to do (cell.yaml, eval.yaml), what was said
(log.txt, eval-log.txt) and what was measured (eval.json).
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
from foveate.compare.settings import SEED, Asked, Base, Comparison, Trained, at_rate
from foveate.data import final_images
from foveate.evaluate import Plan
from foveate.train import recipe as recipes

__all__ = ["EVALUATE", "Cell", "Key", "Work", "chosen", "make_cells", "plain", "read_work"]

EVALUATE = "evaluate"
_RECIPES = {"finetune": recipes.Finetune, "reduce": recipes.Reduce}


@dataclass(frozen=True)
class Key:
    """Which model a cell is about.

    Attributes:
        model: the base model.
        method: trained from it; None is the base model itself.
        rate: of the method.
        seed: of training; None is a model that all seeds share.
    """

    model: str
    method: str | None = None
    rate: float | None = None
    seed: int | None = None

    @property
    def folder(self) -> str:
        """Where it lies, from the comparison's folder."""
        end = "" if self.seed is None else f"/seed{self.seed}"
        if self.method is None:
            return f"models/{self.model}{end}"
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"reduced/{self.model}/{self.method}{rate}{end}"


@dataclass(kw_only=True)
class Work:
    """What one cell does, as its file says.

    Attributes:
        job: "finetune", "reduce" or "evaluate".
        recipe: of a training, resolved.
        model: what is evaluated: a file or folder.
        asked: of the evaluation, as ``foveate.evaluate.Plan`` takes it.
        device: of the evaluation; "auto" takes a GPU if there is one.
        workers: of the evaluation.
    """

    job: str
    recipe: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    workers: int = 0

    @property
    def settings(self) -> recipes.Finetune | recipes.Reduce:
        """The recipe of a training."""
        return config.parse(_RECIPES[self.job], self.recipe, (), "recipe")

    @property
    def recipe_class(self) -> type:
        """What the recipe of a training is read as."""
        return _RECIPES[self.job]


@dataclass(frozen=True)
class Cell:
    """One training or one evaluation.

    Attributes:
        key: of which model.
        work: what to do.
        folder: where.
        start: folder of the trained model that it begins with or evaluates, below the
            comparison's folder; None if that is from elsewhere.
        needs: the names of the cells that come before it.
    """

    key: Key
    work: Work
    folder: Path
    start: str | None = None
    needs: tuple[str, ...] = ()

    @property
    def evaluates(self) -> bool:
        """Whether it is an evaluation."""
        return self.work.job == EVALUATE

    @property
    def name(self) -> str:
        """Its folder, and "eval" behind it for an evaluation."""
        return self.key.folder + "/eval" * self.evaluates

    @property
    def file(self) -> Path:
        """Where its work is written for the process that does it."""
        return self.folder / ("eval.yaml" if self.evaluates else "cell.yaml")

    @property
    def log(self) -> Path:
        """Where that process writes."""
        return self.folder / ("eval-log.txt" if self.evaluates else "log.txt")


def make_cells(comparison: Comparison, out: Path) -> dict[str, Cell]:
    """All cells by name, each after those that it needs. Recipes are read and checked."""
    out = out.resolve()
    trainings = [*_base_cells(comparison, out), *_method_cells(comparison, out)]
    data = _one_data(comparison, trainings)
    found: dict[str, Cell] = {}
    for cell in trainings:
        if cell.name in found:
            raise ValueError(f"two trainings would lie in {cell.name}: rename a method")
        # A training without a job is an opened model, of which there is only an evaluation.
        if cell.work.job:
            found[cell.name] = cell
        own = _evaluation(comparison, cell, data)
        found[own.name] = own
    return found


def chosen(cells: Mapping[str, Cell], only: str | None) -> set[str]:
    """Names of the cells that a glob selects; all without one."""
    if only is None:
        return set(cells)
    found = {name for name in cells if fnmatch.fnmatchcase(name, only)}
    if not found:
        raise ValueError(f"--only {only} selects no cell; one is called {next(iter(cells))}")
    return found


def read_work(path: Path) -> Work:
    """The work that a cell's file holds."""
    return config.read(Work, path)


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON would have it."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return found


def _base_cells(comparison: Comparison, out: Path) -> Iterator[Cell]:
    """Trainings of base models; opened ones have no job."""
    base: Base
    for name, base in comparison.models.items():
        for seed in (None,) if base.shared else comparison.seeds:
            key = Key(name, seed=seed)
            if base.open is not None:
                work = Work(job="", model=_opened(base, seed))
                yield Cell(key, work, out / key.folder)
                continue
            assert base.recipe is not None
            yield _training(comparison, out, key, "finetune", base.recipe, base.settings)


def _method_cells(comparison: Comparison, out: Path) -> Iterator[Cell]:
    method: Trained
    for name, method in comparison.methods.items():
        for start in method.starts:
            for rate in method.rates or (None,):
                text = method.method if rate is None else at_rate(method.method, rate)
                own = (f"method={json.dumps(text)}", *method.settings)
                for seed in comparison.seeds:
                    key = Key(start, name, rate, seed)
                    yield _training(comparison, out, key, "reduce", method.recipe, own)


def _training(
    comparison: Comparison, out: Path, key: Key, job: str, recipe: str, own: Sequence[str]
) -> Cell:
    """A training, from the model of the same seed that comes before it."""
    start: str | None = None
    below: str | None = None
    needs: tuple[str, ...] = ()
    before = key.model if key.method is not None else comparison.models[key.model].start
    if before is not None:
        base: Base = comparison.models[before]
        if base.open is not None:
            start = _opened(base, key.seed)
        else:
            below = Key(before, seed=key.seed).folder
            start, needs = str(out / below), (below,)
    settings = [*comparison.settings, *own, f"loop.seed={key.seed}"]
    if start is not None:
        settings.append(f"model.start={json.dumps(start)}")
    try:
        read: recipes.Recipe = config.read(_RECIPES[job], config.find_recipe(job, recipe), settings)
    except ValueError as error:
        raise ValueError(f"{key.folder}: {error}") from None
    return Cell(key, Work(job=job, recipe=plain(read)), out / key.folder, below, needs)


def _opened(base: Base, seed: int | None) -> str:
    """The file or folder of a model that is opened, found from anywhere."""
    text = str(base.open).replace(SEED, str(seed))
    path = Path(text).expanduser()
    if text != "demo" and not path.exists():
        raise ValueError(f"{text} does not exist; open names a checkpoint or folder")
    return text if text == "demo" else str(path.resolve())


def _one_data(comparison: Comparison, trainings: Sequence[Cell]) -> dict[str, Any]:
    """Say what everything is evaluated on: one protocol means the same images.

    They are the test images of the recipes, or those for validation where there are none.
    """
    limit = comparison.evaluate.limit
    if comparison.data is not None:
        return {"data": comparison.data, "limit": limit}
    final = cache(final_images)  # it opens the data, which most recipes share
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for cell in trainings:
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
    return next(iter(found.values()))[0]


def _words(own: Mapping[str, Any]) -> str:
    words = own["data"] if own["split"] is None else f"{own['data']} ({own['split']})"
    return words if own["limit"] is None else f"{own['limit']} of {words}"


def _evaluation(comparison: Comparison, cell: Cell, data: Mapping[str, Any]) -> Cell:
    """What is measured of a cell's model."""
    asked: Asked = comparison.evaluate
    key, untrained = cell.key, comparison.untrained
    given: dict[str, Any] = dict(data)
    shared = ("mask_seeds", "speed", "rounds", "batch", "precision")
    given |= {name: getattr(asked, name) for name in shared}
    if key.method is not None:
        given["statistics"] = asked.statistics
    else:
        methods: tuple[str, ...] = ()
        if untrained is not None and key.model in untrained.starts:
            methods = untrained.written()
        given |= {"methods": methods, "statistics": asked.statistics and bool(methods)}
        if comparison.pruned(key.model):
            given |= {"occlusion": asked.occlusion, "pruning": asked.pruning}
    trained = bool(cell.work.job)
    work = Work(
        job=EVALUATE,
        model=str(cell.folder) if trained else cell.work.model,
        asked=plain(Plan(**given)),
        device=asked.device,
        workers=asked.workers,
    )
    for name in ("device", "workers"):
        del work.asked[name]
    needs = (cell.name,) if trained else ()
    return Cell(key, work, cell.folder, key.folder if trained else None, needs)
