"""One cell in a process of its own: ``python -m foveate.measure.cell FILE``.

A cell finds out itself whether to begin or to resume, so it can be started again at any time.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate import config, machine
from foveate.core.calibration import can_calibrate
from foveate.dense import DenseModel
from foveate.measure.cells import EVALUATE, Work, read_work
from foveate.measure.dense import evaluate_dense
from foveate.measure.run import Evaluation, Plan, Progress, evaluate
from foveate.measure.state import fingerprint
from foveate.train.models import open_start

__all__ = ["alone", "do", "judge", "main", "train"]

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the work in a cell's file; return 0, or 2 after an error that one sentence explains."""
    (name,) = sys.argv[1:] if argv is None else argv
    path = Path(name)
    try:
        with alone(path):
            do(read_work(path), path.parent)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def do(work: Work, folder: Path) -> None:
    """Train, probe or evaluate in a folder."""
    if work.job == EVALUATE:
        judge(work, folder, machine.command("foveate.measure.cell"))
    elif not (folder / "result.json").is_file():
        train(work, folder)


def train(
    work: Work, folder: Path, *, progress: bool = False, say: Callable[[str], None] = _log.info
) -> None:
    """Run a recipe, or resume its run; nothing else in foveate.measure starts the engine."""
    if work.job == "probe":
        from foveate.train.probe import probe

        probe(work.settings, folder)
        return
    recipe, path = work.settings, folder / "recipe.yaml"
    resume = any((folder / "checkpoints").glob("update-*.ckpt"))
    if resume:
        # It differs at most in the path of the start; a run resumes with its own recipe.
        recipe = config.read(work.recipe_class, path)
    elif _rank() == 0:
        path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    run: Callable[..., Any]
    if work.job == "pretrain":
        from foveate.mim.run import pretrain as run
    elif work.job == "detect":
        from foveate.train.detect import detect as run
    elif work.job == "segment":
        from foveate.train.segment import segment as run
    else:
        from foveate.train.run import train as run
    how: dict[str, Any] = {"resume": resume, "progress": progress, "say": say}
    run(recipe, folder, **how, again="the same command")


def judge(work: Work, folder: Path, command: str, progress: Progress | None = None) -> Evaluation:
    """Evaluate the models of a cell, and write what was found."""
    of = {label: fingerprint(model) for label, model in work.models.items()}
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in work.asked.items()
    }
    given["methods"] = {label: tuple(found) for label, found in given["methods"].items()}
    plan = Plan(**given, device=work.device, workers=work.workers)
    models = {label: open_start(model).eval() for label, model in work.models.items()}
    dense = {label: model for label, model in models.items() if isinstance(model, DenseModel)}
    if dense and len(dense) < len(models):
        raise ValueError(
            f"dense models ({', '.join(dense)}) and classifiers cannot be evaluated together"
        )
    if dense:
        if not any(can_calibrate(model.reducer) for model in dense.values()):
            plan = replace(plan, calibration=0)  # a comparison asks it of all alike
        found = evaluate_dense(dense, plan, command=command, progress=progress)
    else:
        found = evaluate(models, plan, command=command, progress=progress)
    found.about["settings"] |= {"asked": work.asked, "of": of}
    found.save(folder / "eval.json")
    return found


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock while the process lives; ValueError if another process has it.

    Of several processes that run the cell together the first one holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if _rank():
        yield
        return
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work on {path}") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
