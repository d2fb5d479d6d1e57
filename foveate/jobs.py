"""The jobs of the command line as plain functions, for programs and notebooks.

Each takes a model (a timm model name, a path, or your own module), images (the name of a data set,
or your own data set) and groups of settings, as dictionaries or as the classes of
``foveate.train.recipe``. A recipe comes first. A dictionary changes some of its keys, while a
class, or a model that is named or given, replaces a whole group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from foveate import config
from foveate.convert import SHIPPED, open_base
from foveate.convert.hub import is_hub_name
from foveate.convert.named import check_name
from foveate.core import ReducedViT, Reducer
from foveate.core.evaluation import evaluating
from foveate.dense import DenseModel
from foveate.measure import Evaluation, Plan, Results, evaluate_dense
from foveate.measure import evaluate as run_evaluation
from foveate.mim.masks import Hiding
from foveate.mim.mto import Mto
from foveate.mim.recipe import Pretrain, Watch
from foveate.mim.run import pretrain as run_pretrain
from foveate.registry import suggest
from foveate.stages import Measured, Pipeline
from foveate.stages import run as run_stages
from foveate.train import recipe as recipes
from foveate.train.adapt import adapt as run_adapt
from foveate.train.dense_recipe import Detect, Segment
from foveate.train.detect import detect as run_detect
from foveate.train.models import LVVIT_MODELS
from foveate.train.probe import probe as run_probe
from foveate.train.processes import device_of, processes
from foveate.train.result import Result
from foveate.train.run import train
from foveate.train.segment import segment as run_segment

__all__ = [
    *("adapt", "detect", "evaluate", "finetune", "model_group", "pipeline", "pretrain", "probe"),
    *("reduce", "segment"),
]

_R = TypeVar("_R")
Settings = Mapping[str, Any]
Say = Callable[[str], None]


def finetune(
    model: str | Path | nn.Module | recipes.Model | Settings | None = None,
    data: Any = None,
    *,
    mix: recipes.Mix | Settings | None = None,
    optim: recipes.Optim | Settings | None = None,
    loop: recipes.Loop | Settings | None = None,
    masking: recipes.Masking | Settings | None = None,
    distill: recipes.Distill | Settings | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Result:
    """Fine-tune a plain ViT, on whole images or with random patches hidden.

    Args:
        model: a timm model name, for its pretrained weights; a path to weights; your own module,
            which is trained in place; or the group "model" of a recipe.
        data: what ``foveate.data.open_source`` takes; your own labelled data set; or the group
            "data", whose train, val and test may be data sets too.
        mix: the group "mix" of a recipe, as a dictionary or its class; the next four likewise.
        optim: the group "optim".
        loop: the group "loop".
        masking: the group "masking".
        distill: the group "distill".
        recipe: name of a recipe that ships, or a YAML file; the groups change it.
        out: folder of the run; None takes runs/finetune, or the next free name.
        resume: resume the run in ``out``.
        progress: show a progress bar.
        say: called before training with a summary of the model, the data and the settings.
    """
    groups = {"mix": mix, "optim": optim, "loop": loop, "masking": masking, "distill": distill}
    made = _recipe(recipes.Finetune, "finetune", recipe, model, data, groups)
    return train(
        made, _folder("finetune", out, made.loop, resume), resume=resume, progress=progress, say=say
    )


def reduce(
    model: str | Path | nn.Module | recipes.Model | Settings | None = None,
    method: str | Settings | Reducer | None = None,
    data: Any = None,
    *,
    budget: str | None = None,
    mix: recipes.Mix | Settings | None = None,
    optim: recipes.Optim | Settings | None = None,
    loop: recipes.Loop | Settings | None = None,
    teacher: str | Path | nn.Module | None = None,
    weights: Mapping[str, float] | None = None,
    token_loss: str | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Result:
    """Train a model together with a reduction method.

    Args:
        model: as in ``finetune``; or a model from ``foveate.apply`` with its method.
        method: reduction method, such as "dynamicvit(keep=0.7)"; or a dictionary with its name and
            options.
        data: as in ``finetune``.
        budget: what a pass may cost or take, such as "60%", "1.5x faster" or "12 ms" on the device
            that trains; it sets the method's rate.
        mix: the group "mix" of a recipe, as a dictionary or its class; the next two likewise.
        optim: the group "optim".
        loop: the group "loop".
        teacher: weights or a model that losses compare with; None is the model before training.
        weights: weights of losses, which replace the method's own.
        token_loss: loss between final tokens and the teacher's: "mse" or "kl".
        recipe: name of a recipe that ships, or a YAML file.
        out: folder of the run; None takes runs/reduce, or the next free name.
        resume: resume the run in ``out``.
        progress: show a progress bar.
        say: called before training with a summary of the model, the data and the settings.
    """
    if isinstance(model, ReducedViT):
        if method is not None:
            raise ValueError(f"the model has its own method {model.reducer!r}: give no other")
        method, model = model.reducer, model.vit
    groups = {
        **{"mix": mix, "optim": optim, "loop": loop, "method": method},
        **{"budget": budget, "teacher": teacher, "weights": weights, "token_loss": token_loss},
    }
    made = _recipe(recipes.Reduce, "reduce", recipe, model, data, groups)
    return train(
        made, _folder("reduce", out, made.loop, resume), resume=resume, progress=progress, say=say
    )


def adapt(
    model: str | Path | nn.Module | recipes.Model | Settings | None = None,
    method: str | Settings | Reducer | None = None,
    data: Any = None,
    *,
    budget: str | None = None,
    train: str | None = None,
    weights: Mapping[str, float] | None = None,
    optim: recipes.Optim | Settings | None = None,
    loop: recipes.Loop | Settings | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Result:
    """Train a model with a method, on images without labels, to answer as it does without it.

    Args:
        model: as in ``finetune``; or one with a method: a model from ``foveate.apply``, or a folder
            that ``foveate.save`` wrote.
        method: method, such as "evit(keep=0.7)"; None takes the method of the given model, or else
            the recipe's.
        data: as in ``finetune``; labels are not used.
        budget: as in ``reduce``.
        train: parts to train: "method", "blocks:N" (the method and the last N blocks) or "all".
        weights: weights of losses, such as {"kl": 0.5, "ratio": 4.0}.
        optim: the group "optim" of a recipe, as a dictionary or its class.
        loop: the group "loop".
        recipe: name of a recipe that ships, or a YAML file; the groups change it.
        out: folder of the run; None takes runs/adapt, or the next free name.
        resume: resume the run in ``out``.
        progress: show a progress bar.
        say: called before training with a summary of the model, the data and the settings.
    """
    groups = {
        **{"method": method, "budget": budget, "train": train, "weights": weights},
        **{"optim": optim, "loop": loop},
    }
    own = ("method",) if isinstance(model, (str, Path, nn.Module)) else ()
    made = _recipe(recipes.Adapt, "adapt", recipe, model, data, groups, without=own)
    folder = _folder("adapt", out, made.loop, resume)
    return run_adapt(made, folder, resume=resume, progress=progress, say=say)


def detect(
    model: str | Path | nn.Module | recipes.Model | Settings | None = None,
    data: Any = None,
    *,
    backbone: Settings | None = None,
    head: Settings | None = None,
    method: str | Settings | Reducer | None = None,
    optim: recipes.Optim | Settings | None = None,
    loop: recipes.Loop | Settings | None = None,
    weights: Mapping[str, float] | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Result:
    """Train a detector on a ViT, dense or with a method.

    Args:
        model: as in ``finetune``, without a head; or a detector, or the path of one, to train
            further.
        data: images with objects: a spec such as "coco:photos", your own data set, or the group
            "data".
        backbone: name and options of the backbone, such as {"name": "pyramid"}.
        head: name and options of the detector, such as {"name": "faster_rcnn"}.
        method: method, such as "svit(keep=0.7)"; None computes all tokens.
        optim: the group "optim" of a recipe, as a dictionary or its class.
        loop: the group "loop".
        weights: weights of losses, such as {"mask": 2.0, "ratio": 4.0}.
        recipe: name of a recipe that ships, or a YAML file; the groups change it.
        out: folder of the run; None takes runs/detect, or the next free name.
        resume: resume the run in ``out``.
        progress: show a progress bar.
        say: called before training with a summary of the model, the data and the settings.
    """
    parts = {"backbone": backbone, "head": head, "method": method, "weights": weights}
    made = _recipe(Detect, "detect", recipe, model, data, {**parts, "optim": optim, "loop": loop})
    folder = _folder("detect", out, made.loop, resume)
    return run_detect(made, folder, resume=resume, progress=progress, say=say)


def segment(
    model: str | Path | nn.Module | recipes.Model | Settings | None = None,
    data: Any = None,
    *,
    backbone: Settings | None = None,
    head: Settings | None = None,
    method: str | Settings | Reducer | None = None,
    optim: recipes.Optim | Settings | None = None,
    loop: recipes.Loop | Settings | None = None,
    weights: Mapping[str, float] | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Result:
    """Train a network for semantic segmentation on a ViT, dense or with a method.

    Args:
        model: as in ``detect``.
        data: images with a class for each pixel: a spec such as "masks:photos", your own data set,
            or the group "data".
        backbone: as in ``detect``.
        head: name and options of the head, such as {"name": "upernet"}.
        method: method, such as "svit(keep=0.7)"; None computes all tokens.
        optim: the group "optim" of a recipe, as a dictionary or its class.
        loop: the group "loop".
        weights: weights of losses, such as {"ratio": 4.0}.
        recipe: name of a recipe that ships, or a YAML file; the groups change it.
        out: folder of the run; None takes runs/segment, or the next free name.
        resume: resume the run in ``out``.
        progress: show a progress bar.
        say: called before training with a summary of the model, the data and the settings.
    """
    parts = {"backbone": backbone, "head": head, "method": method, "weights": weights}
    made = _recipe(Segment, "segment", recipe, model, data, {**parts, "optim": optim, "loop": loop})
    folder = _folder("segment", out, made.loop, resume)
    return run_segment(made, folder, resume=resume, progress=progress, say=say)


def pretrain(
    model: str | Path | nn.Module | recipes.Model | Settings | None = None,
    data: Any = None,
    *,
    method: str | None = None,
    options: Settings | None = None,
    mask: Hiding | Settings | None = None,
    mto: Mto | Settings | None = None,
    optim: recipes.Optim | Settings | None = None,
    loop: recipes.Loop | Settings | None = None,
    watch: Watch | Settings | None = None,
    snapshots: int | tuple[int, ...] | None = None,
    layers_every: int | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Result:
    """Pre-train a ViT on images without labels.

    Args:
        model: a timm model name, for new weights; your own module; a path to weights to start
            from; or the group "model".
        data: as in ``finetune``; labels are not used.
        method: "mae", "simmim", "bootmae" or "conmim".
        options: options of the method, such as {"decoder_depth": 4}.
        mask: the group "mask" of a recipe, as a dictionary or its class; the next three likewise.
        mto: the group "mto"; {} turns masked token optimisation on with its default settings.
        optim: the group "optim".
        loop: the group "loop".
        watch: the group "probe" of a recipe: a labelled set on which the backbone is measured
            during training.
        snapshots: epochs whose weights are kept: a number N for every Nth epoch, or a list of
            epochs.
        layers_every: number of epochs between measurements of heterogeneity.
        recipe: name of a recipe that ships, or a YAML file.
        out: folder of the run; None takes runs/pretrain, or the next free name.
        resume: resume the run in ``out``.
        progress: show a progress bar.
        say: called before training with a summary of the model, the data and the settings.
    """
    groups = {
        **{"method": method, "options": options, "mask": mask, "mto": mto, "optim": optim},
        **{"loop": loop, "probe": watch, "snapshots": snapshots, "layers_every": layers_every},
    }
    made = _recipe(Pretrain, "pretrain", recipe, model, data, groups, scratch=True)
    folder = _folder("pretrain", out, made.loop, resume)
    return run_pretrain(made, folder, resume=resume, progress=progress, say=say)


def probe(
    model: str | Path | nn.Module | recipes.Model | Settings | None = None,
    data: Any = None,
    *,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    **reading: Any,
) -> Result:
    """Measure frozen features, by a linear classifier and by nearest neighbours.

    Args:
        model: as in ``finetune``.
        data: as in ``finetune``.
        recipe: name of a recipe that ships, or a YAML file.
        out: folder of the results; None takes runs/probe, or the next free name.
        **reading: settings of ``foveate.train.recipe.Probe``, such as feature="avg", epochs=50.
    """
    made = _recipe(recipes.Probe, "probe", recipe, model, data, reading)
    return run_probe(made, _folder("probe", out, recipes.Loop(device="cpu")))


def evaluate(
    model: str | Path | nn.Module | Mapping[str, Any],
    data: Any = None,
    methods: str | Sequence[str] = (),
    **asked: Any,
) -> Evaluation:
    """Measure accuracy (or AP, or mIoU) and multiply-adds of models, and of methods on them.

    Args:
        model: a timm model name, a path, or a module; or a dictionary of several, by the names
            that they have in tables.
        data: what ``foveate.data.open_source`` takes, or your own data set; None is the part of
            Fashion-MNIST that ships.
        methods: methods to put on the models, such as "evit(keep=0.7)".
        **asked: fields of ``foveate.measure.Plan``, such as split="val", batch=256,
            occlusion=(0.5, 0.9), speed=(1, 32), device="cpu".

    Returns:
        A table of numbers (``table``), and how they were measured (``about``).
    """
    given = model if isinstance(model, Mapping) else {_label(model): model}
    models = {
        name: one if isinstance(one, nn.Module) else open_base(str(one))
        for name, one in given.items()
    }
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    known = {field.name for field in dataclasses.fields(Plan)}
    for name in asked:
        if name not in known:
            raise ValueError(suggest("part of foveate.evaluate", name, sorted(known)))
    spec = "fashion-mnist" if data is None else data
    dense = {name: one for name, one in models.items() if isinstance(one, DenseModel)}
    if dense and len(dense) < len(models):
        raise ValueError(
            f"dense models ({', '.join(dense)}) and classifiers cannot be evaluated together"
        )
    with evaluating(*models.values()):
        if dense:
            return evaluate_dense(dense, Plan(data=spec, methods=names, **{"batch": 1, **asked}))
        return run_evaluation(models, Plan(data=spec, methods=names, **asked))


def pipeline(
    recipe: str | Path | None = None,
    data: str | Path | Settings | None = None,
    *,
    stages: Settings | None = None,
    loop: Settings | None = None,
    evaluate: Measured | Settings | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    say: Say = print,
) -> Results:
    """Run several jobs one after another, each from the model before it, and evaluate them.

    Finished stages in ``out`` are skipped, and an interrupted one is resumed.

    Args:
        recipe: name of a recipe that ships, or a YAML file; the other arguments change it.
        data: what ``foveate.data.open_source`` takes, for all stages; or settings of the group
            "data". Only single jobs take your own data sets: another process may resume a stage,
            and it finds its images by their spec.
        stages: stages by name, in order, as in a recipe.
        loop: settings of the group "loop" for all stages.
        evaluate: settings of what is measured at the end.
        out: folder of all stages; None takes runs/pipeline, or the next free name.
        progress: show progress bars.
        say: called with progress messages and results.

    Returns:
        A table of numbers (``table``), and how they were measured (``about``).
    """
    tree = {} if recipe is None else config.load(config.find_recipe("pipeline", str(recipe)))
    if not (data is None or isinstance(data, (str, Path, Mapping))):
        raise ValueError(
            "foveate.pipeline takes images by their spec, such as folder:photos, got "
            f"{config.described(data)}"
        )
    given = {"stages": stages, "data": _data(data), "loop": loop, "evaluate": evaluate}
    for name, value in given.items():
        if value is not None:
            tree[name] = _laid_over(tree.get(name), _leaves(value, (name,), {}))
    made = config.parse(Pipeline, tree, where="foveate.pipeline")
    folder = _folder("pipeline", out, config.parse(recipes.Loop, made.loop))
    found = run_stages(made, folder, progress=progress, say=say)
    if found is None:
        raise ValueError("only the first of several processes gets the table of foveate.pipeline")
    return found[0]


def _label(model: str | Path | nn.Module) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else Path(str(model)).name


# From what was given to a recipe ------------------------------------------------------------------


def _recipe(
    cls: type[_R],
    job: str,
    recipe: str | Path | None,
    model: Any,
    data: Any,
    groups: Mapping[str, Any],
    *,
    scratch: bool = False,
    without: Sequence[str] = (),
) -> _R:
    """Make a recipe and change it by the given groups; objects are put in at the end.

    Args:
        cls: class of the recipe.
        job: name of the job.
        recipe: name of a recipe that ships, or a file.
        model: argument for the group "model".
        data: argument for the group "data".
        groups: arguments for the other groups; None leaves the recipe's.
        scratch: see ``model_group``.
        without: keys of the recipe to leave out, because the arguments replace them.
    """
    tree: dict[str, Any] = {}
    if recipe is not None:
        tree = config.load(config.find_recipe(job, str(recipe)))
        tree = {key: value for key, value in tree.items() if key not in without}
    given = {**groups, "model": model_group(model, scratch), "data": _data(data)}
    objects: dict[tuple[str, ...], Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        whole = dataclasses.is_dataclass(value) or (name == "model" and value is not model)
        value = _leaves(value, (name,), objects)
        tree[name] = value if whole else _laid_over(tree.get(name), value)
    made = config.parse(cls, tree, where=f"foveate.{job}")
    for (*path, last), value in objects.items():
        place: Any = made
        for step in path:
            place = place[step] if isinstance(place, dict) else getattr(place, step)
        if isinstance(place, dict):  # options are a dictionary
            place[last] = value
        else:
            setattr(place, last, value)
    return made


def model_group(given: Any, scratch: bool = False) -> Any:
    """Return the group "model" of a recipe for a name, a path or a module.

    Args:
        given: name, path or module; anything else, such as a group, is returned as it is.
        scratch: begin with new weights if a timm model name is given.
    """
    if isinstance(given, nn.Module):
        return {"start": given}
    if isinstance(given, (str, Path)):
        name = str(given)
        if name in SHIPPED or is_hub_name(name) or Path(name).exists():
            return {"start": name}
        if name not in LVVIT_MODELS:
            check_name(name)
        return {"name": name} if scratch else {"name": name, "start": "pretrained"}
    return given


def _data(given: Any) -> Any:
    """Return the group "data" of a recipe for a spec or a data set."""
    if given is None or isinstance(given, (Mapping, recipes.Data)):
        return given
    return {"train": str(given) if isinstance(given, Path) else given}


def _laid_over(before: Any, value: Any) -> Any:
    """Change groups key by key, and replace everything else as a whole."""
    if not (isinstance(before, Mapping) and isinstance(value, Mapping)):
        return value
    return {**before, **{key: _laid_over(before.get(key), one) for key, one in value.items()}}


def _leaves(value: Any, path: tuple[str, ...], objects: dict[tuple[str, ...], Any]) -> Any:
    """Return plain data; collect objects that no file could hold, and replace them by words."""
    dataset = path[0] == "data" and path[-1] in ("train", "val", "test")
    if dataset and not (value is None or isinstance(value, (str, Path))):
        objects[path] = value  # a data set may be of any type
        return config.described(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, Reducer):
        fields = dataclasses.fields(value)
        value = {field.name: getattr(value, field.name) for field in fields}
    if isinstance(value, Mapping):
        return {key: _leaves(one, (*path, str(key)), objects) for key, one in value.items()}
    if isinstance(value, (list, tuple)) and all(
        isinstance(one, (str, int, float)) for one in value
    ):
        return list(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    objects[path] = value
    return config.described(value)


def _folder(job: str, out: str | Path | None, loop: recipes.Loop, resume: bool = False) -> Path:
    """Return the folder of a run: the given one, or the first that is free."""
    if out is not None:
        return Path(out)
    if resume:
        raise ValueError("resume=True continues the run in the folder out: name that folder")
    if math.prod(processes(loop, device_of(loop))) > 1:
        raise ValueError(
            "several processes train together, and each would choose its own folder: name one, "
            f"such as out='runs/{job}'"
        )
    found, number = Path("runs", job), 1
    while found.exists():
        number += 1
        found = Path("runs", f"{job}-{number}")
    return found
