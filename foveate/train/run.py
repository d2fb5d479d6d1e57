"""One training run, from a recipe to an exported model, in a folder of its own.

recipe.yaml        what was asked for, resolved, before the first step
budget.json        the method's rate that met a budget, if there was one
metrics.csv        every logged value, by update
seconds.csv        how long training took, by epoch
tensorboard/       the same for TensorBoard
checkpoints/       the last few, to resume from
best.pt            the weights that did best on the validation images so far
pictures/          of evaluated images, every few epochs
model.safetensors  the trained model (``model/`` where a method or transformers saved it)
best/              the same with the best weights, if they are not the last
result.json        accuracy, duration, what it ran on; written last
"""

from __future__ import annotations

import copy
import errno
import importlib
import json
import logging
import math
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from foveate import config, machine
from foveate.backbones import set_class_names
from foveate.convert import note_run
from foveate.data import Loader, Source, Splits, Transform, limited, usual_workers
from foveate.files import made_folder, write_text
from foveate.train import recipe as recipes
from foveate.train.bars import LineBar, RichBar
from foveate.train.best import Best
from foveate.train.build import make_finetune, make_reduce
from foveate.train.callbacks import Pictures, TokenCounts
from foveate.train.checkpoints import Checkpoints, WholeFiles, any_checkpoint, newest
from foveate.train.logs import MetricsFile
from foveate.train.module import Module
from foveate.train.optim import updates_of
from foveate.train.processes import check_loop, device_of, processes
from foveate.train.result import Result
from foveate.train.screens import first_screen
from foveate.train.sharded import Sharded, whole_state
from foveate.train.splits import check_start, open_data
from foveate.train.task import Task
from foveate.train.throughput import SECONDS, Throughput

__all__ = ["Loaders", "fit", "make_loaders", "method_callbacks", "train"]

_log = logging.getLogger(__name__)
_RECIPE, _METRICS, _RESULT = "recipe.yaml", "metrics.csv", "result.json"
_FREE = 200 * 2**20  # bytes that a run needs besides its checkpoints
_LOGGERS = {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger"}

Build = Callable[[Any], tuple[Task, Splits]]
OwnCallbacks = Callable[[Any, Task, "Loaders", Path], list[Callback]]


def train(
    recipe: recipes.Finetune | recipes.Reduce,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _log.info,
    again: str | None = None,
) -> Result:
    """Train a classifier, with or without a method, and export it.

    Args:
        recipe: the recipe of the run.
        out: folder of the run; made if missing.
        resume: go on from the newest checkpoint there that can be read.
        progress: show a progress bar.
        say: called, before the first step, with a summary of what is trained on what.
        again: command to show for resuming a stopped run; None shows --resume and the folder.

    Of several processes only the first exports, and says where in "model".
    """
    how: dict[str, Any] = {"resume": resume, "progress": progress, "say": say, "again": again}
    return fit(recipe, out, partial(_build, out=out), callbacks=method_callbacks, **how)


def fit(
    recipe: recipes.Recipe,
    out: Path,
    build: Build,
    *,
    callbacks: OwnCallbacks = lambda *_: [],
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _log.info,
    again: str | None = None,
) -> Result:
    """Train as ``train`` does, for any task.

    Args:
        recipe: recipe of the job; for your own task a ``Recipe`` is enough.
        out: folder of the run.
        build: makes the task and opens its images, from the recipe.
        callbacks: makes the callbacks of this job, from recipe, task, loaders and folder.
        resume: go on from the newest checkpoint.
        progress: show a progress bar.
        say: called, before the first step, with a summary of what is trained on what.
        again: command to show for resuming.
    """
    started = time.monotonic()
    loop = recipe.loop
    with _quiet():
        trainer = _trainer(recipe, out, progress)
    rank, world = trainer.global_rank, trainer.world_size
    with made_folder(out):
        checkpoint = _prepare_folder(recipe, out, resume, rank)
        torch.manual_seed(loop.seed)  # of new weights
        task, splits = build(recipe)
        loaders = make_loaders(recipe, task, splits, rank, world, trainer.num_devices)
        _check_space(out, task, loop.keep_last)
        module = Module(
            task,
            recipe.optim,
            loop,
            loader=loaders.train,
            update_images=recipe.data.batch * loop.accumulate * world,
        )
        if loaders.val is not None:
            _check_score(task)
        own = callbacks(recipe, task, loaders, out)
    best = None
    if loaders.val is not None:
        best = Best(out / "best.pt", loop.patience)
        own = [*own, best]
    # In front of progress bars; checkpoints after what may change the model at a step's end.
    checkpoints = Checkpoints(out / "checkpoints", loop.save_every, loop.keep_last)
    trainer.callbacks[:0] = [*own, checkpoints]  # type: ignore[attr-defined]
    throughput = Throughput(out / SECONDS)
    trainer.callbacks.append(throughput)  # type: ignore[attr-defined]
    resumed = None if checkpoint is None else int(checkpoint.stem.split("-")[1])
    with _quiet():
        trainer.loggers = [MetricsFile(out / _METRICS, resumed), *_loggers(loop, out)]
    if rank == 0:
        write_text(out / _RECIPE, config.dump(recipe))
        say(first_screen(recipe, task, splits, trainer, out))
    # Sharded weights are put together again in a copy that was made before.
    plain = copy.deepcopy(module.exported) if loop.strategy == "fsdp" else None
    module.settle()
    with _quiet(), _stoppable(out, again or f"--resume {quote(str(out))}"):
        trainer.fit(
            module,
            loaders.train,
            loaders.val,
            ckpt_path=None if checkpoint is None else str(checkpoint),
            weights_only=True,
        )
        # Evaluate again if the last evaluation was earlier, or not at the method's final rate.
        stale = module.evaluated != trainer.global_step or trainer.global_step < module.updates
        if loaders.val is not None and stale:
            trainer.validate(module, loaders.val, verbose=False)
    module.check_losses()
    found = _result(recipe, trainer, module, loaders, time.monotonic() - started)
    found["throughput"] = throughput.facts(recipe.data.batch * world)
    exported = module.exported
    if plain is not None:
        plain.load_state_dict(whole_state(exported))
        exported = plain
    exported.eval().to("cpu")
    if rank == 0:
        scores = _of_exported(module.results)
        facts = {name: value for name, value in found.items() if name not in scores}
        exported_to = task.export(exported, out)
        note_run(exported_to, config.load(out / _RECIPE), facts, scores, weights="last")
        found["model"] = exported_to.name
        shutil.rmtree(out / "best", ignore_errors=True)  # of a run that has gone on since
        if best is not None and best.value is not None:
            found["best"] = _best(best, trainer, task, exported, out, found)
            if found["best"].get("model", "").startswith("best/"):
                share = best.update / trainer.global_step
                facts |= {"updates": best.update, "epochs": round(share * found["epochs"], 2)}
                score = {task.score: found["best"]["score"]}
                model = out / found["best"]["model"]
                note_run(model, config.load(out / _RECIPE), facts, score, weights="best")
        write_text(out / _RESULT, json.dumps(found, indent=1) + "\n")
    return Result(out, found, exported)


@dataclass(frozen=True)
class Loaders:
    """The batches of a run and their images; ``val`` is None without validation."""

    splits: Splits
    train: Loader
    val: Loader | None


def make_loaders(
    recipe: recipes.Recipe,
    task: Task,
    splits: Splits,
    rank: int = 0,
    world: int = 1,
    here: int = 1,
) -> Loaders:
    """Make the loaders for one of ``world`` processes, of which ``here`` run on this machine."""
    data = recipe.data
    training, evaluation = task.transforms()

    def load(source: Source, transform: Transform, batch: int, **options: Any) -> Loader:
        if source.finished:  # what does not fit is said before the first step
            try:
                transform(source.sample(0))
            except ValueError as error:
                raise ValueError(f"{source.name(0)} {error}") from None
        workers = data.workers
        if workers is None:
            workers = usual_workers(source, here)
        return Loader(
            source,
            transform,
            batch=batch,
            collate=task.collate,
            workers=workers,
            rank=rank,
            world=world,
            corrupt=data.corrupt,
            pinned=torch.cuda.is_available(),
            **options,
        )

    train = load(
        limited(splits.train, data.limit, balanced=True),
        training,
        data.batch,
        seed=recipe.loop.seed,
        repeats=data.repeats,
    )
    val = None
    if splits.val is not None:
        source = limited(splits.val, data.val_limit, balanced=False)
        if len(source) < world:
            raise ValueError(
                f"{world} processes need a validation image each, and the data have {len(source)}: "
                "train with fewer processes, or give more validation images"
            )
        val = load(source, evaluation, data.val_batch or data.batch, train=False)
    return Loaders(splits, train, val)


def _build(recipe: recipes.Finetune | recipes.Reduce, out: Path) -> tuple[Task, Splits]:
    """Open the data, then build the task, since its head depends on their classes."""
    check_start(recipe.data, recipe.model.start)
    splits = open_data(recipe.data)
    classes = splits.train.classes or ()
    task: Task
    if isinstance(recipe, recipes.Reduce):
        task = make_reduce(recipe, len(classes), out)
    else:
        task = make_finetune(recipe, len(classes))
    set_class_names(task.model, classes)  # they are exported with it
    return task, splits


def method_callbacks(recipe: Any, task: Task, loaders: Loaders, out: Path) -> list[Callback]:
    """Make the callbacks for a model that may have a method."""
    loop = recipe.loop
    found: list[Callback] = []
    assert loaders.val is not None
    if loop.statistics:
        found.append(TokenCounts())
    if loop.pictures_every is not None:
        found.append(Pictures(out / "pictures", loop.pictures_every, loaders.val.source))
    return found


def _best(
    best: Best,
    trainer: Trainer,
    task: Task,
    last: nn.Module,
    out: Path,
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """Export the best weights if they are not the last, and return their score."""
    assert best.value is not None
    about: dict[str, Any] = {"score": round(best.value, 4), "update": best.update}
    if best.update == trainer.global_step:
        return about | {"model": found["model"]}
    restored = copy.deepcopy(last)  # which keeps its weights
    if not best.restore(restored):
        _log.warning("%s is gone, so the best weights are not exported", best.file)
        return about
    (out / "best").mkdir()
    return about | {"model": f"best/{task.export(restored, out / 'best').name}"}


def _check_score(task: Task) -> None:
    """Refuse a task whose metrics do not include the score that chooses the best weights."""
    names = list(task.metrics())
    if task.score not in names:
        raise ValueError(
            f"{type(task).__name__}.score is {task.score!r}, which chooses the best weights, and "
            f"its metrics() are {', '.join(names) or 'none'}: name one of them"
        )


def _prepare_folder(recipe: Any, out: Path, resume: bool, rank: int) -> Path | None:
    """Check the folder, and find what to resume from."""
    if not resume:
        # A recipe alone was left by a run that never started.
        begun = any_checkpoint(out / "checkpoints")
        begun = begun or any((out / name).exists() for name in (_METRICS, _RESULT))
        if begun and (out / _RECIPE).exists() and rank == 0:
            raise ValueError(
                f"{out} holds a run already: --resume goes on with it, --out takes another folder"
            )
        return None
    if not (out / _RECIPE).is_file():
        raise ValueError(f"{out} holds no run to resume: it has no {_RECIPE}")
    before = config.read(type(recipe), out / _RECIPE)
    then, now = before.loop, recipe.loop
    lengths = {name: getattr(now, name) for name in recipes.LENGTHS}
    same = config.dump(replace(before, loop=replace(then, **lengths))) == config.dump(recipe)
    steps, wanted = (math.inf if n is None else n for n in (then.max_steps, now.max_steps))
    if not same or now.epochs < then.epochs or wanted < steps:
        raise ValueError(
            f"{out / _RECIPE} differs from the given recipe: a run goes on as it began, but for "
            "more loop.epochs or loop.max_steps and another loop.patience; start anew elsewhere"
        )
    if now != then and rank == 0:
        (out / _RESULT).unlink(missing_ok=True)  # it is of the shorter run
    if rank == 0:
        for partial in [*out.glob("*.partial"), *out.glob("*/*.partial")]:
            partial.unlink(missing_ok=True)  # was being written as a process was killed
    found = newest(out / "checkpoints")
    if found is None:
        _log.info("%s was killed before its first checkpoint: it starts anew", out)
        return None
    path, content = found
    _log.info("resuming from %s, update %d", path, content["global_step"])
    return path


def _check_space(out: Path, task: Task, keep: int) -> None:
    """Refuse a disk without room for the checkpoints, each of weights and two moments."""
    values = sum(p.numel() * p.element_size() for p in task.parameters())
    needed = 4 * values * (keep + 1) + _FREE
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"{out} has {free / 2**30:.1f} GiB free, and {keep} checkpoints of this model need "
            f"about {needed / 2**30:.1f}"
        )


def _trainer(recipe: recipes.Recipe, out: Path, progress: bool) -> Trainer:
    """Make the trainer first, since it knows which process this is; callbacks come later."""
    loop = recipe.loop
    check_loop(loop)
    device = device_of(loop)
    devices, nodes = processes(loop, device)
    strategy: Any = loop.strategy
    if strategy == "fsdp":
        strategy = Sharded(devices * nodes)
    callbacks: list[Callback] = []
    if progress:
        callbacks.append(RichBar(leave=True) if _terminal() else LineBar(50))
    try:
        return Trainer(
            accelerator=device,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=loop.precision,  # type: ignore[arg-type]
            max_epochs=loop.epochs,
            max_steps=-1,  # see Module.on_train_start
            accumulate_grad_batches=loop.accumulate,
            gradient_clip_val=recipe.optim.clip,
            check_val_every_n_epoch=loop.check_every,
            num_sanity_val_steps=0,
            log_every_n_steps=loop.log_every,
            logger=False,
            callbacks=callbacks,
            plugins=[WholeFiles()],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            use_distributed_sampler=False,
            default_root_dir=str(out),
        )
    except MisconfigurationException as error:
        raise ValueError(" ".join(str(error).split())) from error


def _loggers(loop: recipes.Loop, out: Path) -> list[Any]:
    """Make Lightning's loggers by their names."""
    found: list[Any] = []
    for name in loop.loggers:
        logger = getattr(importlib.import_module("lightning.pytorch.loggers"), _LOGGERS[name])
        if name == "wandb":
            found.append(logger(name=out.name, save_dir=out))
        else:
            found.append(logger(out, name=name, version=""))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's warnings about intended settings, and its advertising."""
    loud = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    before = [log.level for log in loud]
    for log in loud:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # The loader says its own length, shuffles itself and has the workers of the recipe;
            # metrics are of all processes before they are logged.
            for said in (
                *("does not have many workers", "treespec, LeafSpec", "in eval mode at"),
                "recommended to use `self.log",
                *("is smaller than the logging interval", "but have no `val_dataloader`"),
            ):
                warnings.filterwarnings("ignore", f".*{said}.*")
            yield
    finally:
        for log, level in zip(loud, before, strict=True):
            log.setLevel(level)


@contextmanager
def _stoppable(out: Path, again: str) -> Iterator[None]:
    """Tell the user how to resume a run that was stopped or whose disk is full.

    Ctrl-C is Python's KeyboardInterrupt again, and SIGTERM ends with its usual code: Lightning's
    trainer makes a SystemExit of both, and is deaf to Ctrl-C from then on. A notebook would be too.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        terminated = isinstance(stop, SIGTERMException)
        if not terminated and not isinstance(stop.__context__, KeyboardInterrupt):
            raise  # of a callback or a data set
        _log.warning("stopped; %s goes on from the last checkpoint", again)
        if terminated:
            raise SystemExit(143) from None
        raise KeyboardInterrupt from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise OSError(
            f"{out} cannot be written to: {error.strerror}; once that is mended, {again} goes on "
            "from the last checkpoint"
        ) from error
    except ValueError:
        raise  # its message explains the error
    except Exception as error:  # of a callback, a task or a data set, whose traceback says where
        name = type(error).__name__
        _log.warning("ended by %s; once mended, %s goes on from the last checkpoint", name, again)
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _terminal() -> bool:
    return sys.stderr.isatty() or sys.stdout.isatty()


def _result(
    recipe: recipes.Recipe,
    trainer: Trainer,
    module: Module,
    loaders: Loaders,
    seconds: float,
) -> dict[str, Any]:
    val = loaders.val
    epochs = trainer.global_step / updates_of(1, len(loaders.train), recipe.loop.accumulate)
    return {
        "job": type(recipe).__name__.lower(),
        "score": module.task.score,
        "updates": trainer.global_step,
        "epochs": round(epochs, 2),
        **_of_exported(module.results),
        **module.watched,
        "images": {
            "train": loaders.train.images,
            "val": 0 if val is None else val.images,
            "unreadable": len(_unreadable(loaders)),
        },
        "splits": loaders.splits.facts(),
        "minutes_of_this_process": round(seconds / 60, 2),
        "machine": machine.facts(device_of(recipe.loop)),
        "commit": machine.commit(),
    }


def _of_exported(results: Mapping[str, float]) -> dict[str, float]:
    """Return scores by their plain names; if a running mean is exported, these are its scores.

    The scores of the model itself then end in "_without_ema".
    """
    found = {name.removeprefix("val/"): round(value, 4) for name, value in results.items()}
    for name in [name for name in found if name.endswith("_ema")]:
        plain = name.removesuffix("_ema")
        found[f"{plain}_without_ema"], found[plain] = found[plain], found.pop(name)
    return found


def _unreadable(loaders: Loaders) -> set[str]:
    """Return the names of the images that any process of this run could not read."""
    both = [loaders.train, *([] if loaders.val is None else [loaders.val])]
    mine = [name for loader in both for name in loader.unreadable]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return set(mine)
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, mine)
    return {name for share in shares for name in share}
