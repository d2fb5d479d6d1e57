"""One training run, from a recipe to an exported model, in a folder of its own.

recipe.yaml        what was asked for, resolved, before the first step
metrics.csv        every logged value, by update
tensorboard/       the same for TensorBoard
checkpoints/       the last few, to resume from
best.pt            the weights that did best on the validation images so far
pictures/          of evaluated images, every few epochs
model.safetensors  the trained model (``model/`` where a method or transformers saved it)
best/              the same with the best weights, if they are not the last
result.json        accuracy, duration, what it ran on; written last
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from foveate import config
from foveate.backbones import image_settings
from foveate.bench import machine
from foveate.files import write_text
from foveate.train import recipe as recipes
from foveate.train.bars import LineBar, RichBar
from foveate.train.best import Best
from foveate.train.build import Batches, make_batches, make_finetune, make_reduce, open_data
from foveate.train.callbacks import Ema, KeepRate, Pictures, TokenCounts
from foveate.train.checkpoints import Checkpoints, WholeFiles, any_checkpoint, newest
from foveate.train.logs import MetricsFile
from foveate.train.module import Module
from foveate.train.optim import updates_of
from foveate.train.prepare import Prepare
from foveate.train.screens import first_screen
from foveate.train.task import Task

__all__ = ["fit", "train"]

_log = logging.getLogger(__name__)
_RECIPE, _METRICS, _RESULT = "recipe.yaml", "metrics.csv", "result.json"
_FREE = 200 * 2**20  # bytes that a run needs at least besides its checkpoints


def train(
    recipe: recipes.Finetune | recipes.Reduce,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _log.info,
) -> dict[str, Any]:
    """Train, and export the model; gives the content of result.json.

    Args:
        recipe: what to do.
        out: folder of the run; made if missing.
        resume: go on from the newest checkpoint there that can be read.
        progress: show a progress bar.
        say: is told, before the first step, what is trained on what.

    Of several processes only the first exports, and says where in "model".
    """
    return fit(
        recipe, out, _build, callbacks=_own_callbacks, resume=resume, progress=progress, say=say
    )


def fit(
    recipe: Any,
    out: Path,
    build: Callable[[Any, int, int], tuple[Task, Batches]],
    *,
    callbacks: Callable[[Any, Task, Batches, Path], list[Callback]],
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _log.info,
) -> dict[str, Any]:
    """As ``train``, for any job.

    Args:
        recipe: of the job.
        out: folder of the run.
        build: makes the task and its batches from the recipe, this process's number and how many
            there are.
        callbacks: of the job alone, from recipe, task, batches and folder.
        resume: go on.
        progress: show a progress bar.
        say: is told, before the first step, what is trained on what.
    """
    started = time.monotonic()
    if recipe.loop.precision == "16-mixed" and not torch.cuda.is_available():
        # Lightning would take bf16-mixed and merely mention it.
        raise ValueError("loop.precision=16-mixed needs a GPU: on a CPU take 32 or bf16-mixed")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    new = not out.exists()
    checkpoint = _prepare_folder(recipe, out, resume, rank)
    loop, data = recipe.loop, recipe.data
    torch.manual_seed(loop.seed)  # of new weights
    try:
        task, batches = build(recipe, rank, world)
        _check_space(out, task, loop.keep_last)
    except BaseException:
        if new and rank == 0:  # nothing was done: leave nothing behind
            with suppress(OSError):
                out.rmdir()
        raise
    prepare = Prepare(batches.mean, batches.std, recipe.mix, len(batches.classes), data.batch)
    module = Module(
        task,
        prepare,
        recipe.optim,
        loop,
        loader=batches.train,
        update_images=data.batch * loop.accumulate * world,
    )
    best = None
    if batches.val is not None and loop.strategy != "fsdp":  # whose weights lie on all processes
        best = Best(out / "best.pt", loop.patience)
    with _quiet():
        own = callbacks(recipe, task, batches, out) + ([best] if best else [])
        trainer = _trainer(recipe, out, batches, own, checkpoint, progress)
    if rank == 0:
        write_text(out / _RECIPE, config.dump(recipe))
        say(first_screen(recipe, task, batches, out, world))
    task.settle(loop.eval_mode)
    with _quiet():
        try:
            trainer.fit(
                module,
                batches.train,
                batches.val,
                ckpt_path=None if checkpoint is None else str(checkpoint),
                weights_only=True,
            )
        except SystemExit as stop:  # Lightning's ends on Ctrl-C and on SIGTERM, the latter with 0
            _log.warning("stopped; --resume %s goes on from its last checkpoint", out)
            raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from None
        # Not evaluated where it stopped, or not as it is exported: at the method's final rate.
        stale = module.evaluated != trainer.global_step or trainer.global_step < module.updates
        if batches.val is not None and stale:
            trainer.validate(module, batches.val, verbose=False)
    module.check_losses()
    result = _result(recipe, trainer, module, batches, time.monotonic() - started)
    if rank == 0:
        result["model"] = task.export(module.exported.eval().to("cpu"), out).name
        shutil.rmtree(out / "best", ignore_errors=True)  # of a run that has gone on since
        if best is not None and best.value is not None:
            result["best"] = _best(best, trainer, module, out, result)
        write_text(out / _RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _best(
    best: Best, trainer: Trainer, module: Module, out: Path, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Export the best weights where they are not the last, and say how good they are."""
    assert best.value is not None
    found: dict[str, Any] = {"score": round(best.value, 4), "update": best.update}
    if best.update == trainer.global_step:
        return found | {"model": result["model"]}
    if not best.restore(module.exported):
        _log.warning("%s is gone, so the best weights are not exported", best.file)
        return found
    (out / "best").mkdir()
    return found | {"model": f"best/{module.task.export(module.exported, out / 'best').name}"}


def _build(
    recipe: recipes.Finetune | recipes.Reduce, rank: int, world: int
) -> tuple[Task, Batches]:
    """Data first: the model's head is made for its classes."""
    splits = open_data(recipe.data)
    classes = splits.train.classes or ()
    task: Task
    if isinstance(recipe, recipes.Reduce):
        task = make_reduce(recipe, len(classes))
        plain = task.model.vit
    else:
        task = make_finetune(recipe, len(classes))
        plain = task.model
    batches = make_batches(
        recipe.data, plain, splits=splits, seed=recipe.loop.seed, rank=rank, world=world
    )
    _compare_images(task, batches)
    return task, batches


def _own_callbacks(recipe: Any, task: Task, batches: Batches, out: Path) -> list[Callback]:
    """What looks after a model that may have a method."""
    loop = recipe.loop
    found: list[Callback] = [KeepRate()]
    assert batches.val is not None
    if loop.statistics:
        found.append(TokenCounts())
    if loop.pictures_every is not None:
        found.append(Pictures(out / "pictures", loop.pictures_every, batches.val.source))
    return found


def _compare_images(task: Task, batches: Batches) -> None:
    """Warn where a teacher says that it is used to images that were normalised otherwise."""
    if task.teacher is None:
        return
    known = image_settings(task.teacher)
    for what, mine in (("mean", batches.mean), ("std", batches.std)):
        its = known.get(what, mine)
        if len(its) != len(mine) or any(abs(a - b) > 0.01 for a, b in zip(its, mine, strict=True)):
            _log.warning(
                "the teacher knows images of %s %s and is shown the model's, of %s: it may teach "
                "nonsense",
                *(what, list(its), list(mine)),
            )


def _prepare_folder(recipe: Any, out: Path, resume: bool, rank: int) -> Path | None:
    """Check the folder, and find what to resume from."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{rank}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{out} cannot be written to: {error.strerror}") from error
    if not resume:
        # A recipe alone is of a run that came to nothing.
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
    longer = replace(before, loop=replace(before.loop, epochs=recipe.loop.epochs))
    if config.dump(longer) != config.dump(recipe) or recipe.loop.epochs < before.loop.epochs:
        raise ValueError(
            f"{out / _RECIPE} differs from the given recipe: a run goes on as it began, but for "
            "more loop.epochs; start anew elsewhere"
        )
    if recipe.loop.epochs > before.loop.epochs and rank == 0:
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
    """Weights and two moments each, for all checkpoints and the one that is being written."""
    values = sum(p.numel() * p.element_size() for p in task.parameters())
    needed = 4 * values * (keep + 1) + _FREE
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"{out} has {free / 2**30:.1f} GiB free, and {keep} checkpoints of this model need "
            f"about {needed / 2**30:.1f}"
        )


def _trainer(
    recipe: Any,
    out: Path,
    batches: Batches,
    own: list[Callback],
    checkpoint: Path | None,
    progress: bool,
) -> Trainer:
    loop: recipes.Loop = recipe.loop
    resumed = None
    if checkpoint is not None:
        resumed = int(checkpoint.stem.split("-")[1])
    callbacks = [*own]
    if loop.ema is not None:
        callbacks.insert(0, Ema(loop.ema))  # others look at the mean
    # After what may change the model at a step's end, so that a checkpoint has it.
    callbacks.append(Checkpoints(out / "checkpoints", loop.save_every, loop.keep_last))
    if progress:
        callbacks.append(RichBar(leave=True) if _terminal() else LineBar(50))
    loggers: list[Any] = [MetricsFile(out / _METRICS, resumed)]
    if loop.tensorboard:
        loggers.append(TensorBoardLogger(out, name="tensorboard", version=""))
    strategy: Any = loop.strategy
    if strategy == "fsdp":
        # One unit: this strategy wraps modules in others, and a wrapped block is not driven.
        strategy = FSDPStrategy(use_orig_params=True, state_dict_type="full")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Trainer(
        accelerator="auto",
        devices=processes,
        num_nodes=max(1, int(os.environ.get("WORLD_SIZE", 1)) // processes),
        strategy=strategy,
        precision=loop.precision,  # type: ignore[arg-type]
        max_epochs=loop.epochs,
        max_steps=-1 if loop.max_steps is None else loop.max_steps,
        accumulate_grad_batches=loop.accumulate,
        gradient_clip_val=recipe.optim.clip,
        check_val_every_n_epoch=loop.check_every,
        num_sanity_val_steps=0,
        log_every_n_steps=loop.log_every,
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeFiles()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        use_distributed_sampler=False,
        default_root_dir=str(out),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from saying what is meant so, or is advertising."""
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


def _terminal() -> bool:
    return sys.stderr.isatty() or sys.stdout.isatty()


def _result(
    recipe: Any, trainer: Trainer, module: Module, batches: Batches, seconds: float
) -> dict[str, Any]:
    val = batches.val
    epochs = trainer.global_step / updates_of(1, len(batches.train), recipe.loop.accumulate)
    return {
        "job": type(recipe).__name__.lower(),
        "updates": trainer.global_step,
        "epochs": round(epochs, 2),
        **_of_exported(module.results),
        **module.watched,
        "images": {
            "train": batches.train.images,
            "val": 0 if val is None else val.images,
            "unreadable": len(_unreadable(batches)),
        },
        "splits": batches.splits.facts(),
        "minutes_of_this_process": round(seconds / 60, 2),
        "machine": machine.facts("cuda" if torch.cuda.is_available() else "cpu"),
        "commit": machine.commit(),
    }


def _of_exported(results: Mapping[str, float]) -> dict[str, float]:
    """Scores by their plain names; where a running mean is exported, those of the mean.

    What the model itself reached is then called so.
    """
    found = {name.removeprefix("val/"): round(value, 4) for name, value in results.items()}
    for name in [name for name in found if name.endswith("_ema")]:
        plain = name.removesuffix("_ema")
        found[f"{plain}_without_ema"], found[plain] = found[plain], found.pop(name)
    return found


def _unreadable(batches: Batches) -> set[str]:
    """Names of the images that this run, on whichever process, could not read."""
    loaders = [batches.train, *([] if batches.val is None else [batches.val])]
    mine = [name for loader in loaders for name in loader.unreadable]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return set(mine)
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, mine)
    return {name for share in shares for name in share}
