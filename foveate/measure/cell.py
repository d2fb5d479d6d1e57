"""One cell in a process of its own: ``python -m foveate.measure.cell FILE``.

A cell looks for itself whether it begins or goes on, so it can be started again at any time.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveate import config
from foveate.bench import machine
from foveate.measure.cells import EVALUATE, Work, read_work
from foveate.measure.run import Evaluation, Plan, Progress, evaluate
from foveate.measure.shipped import open_any
from foveate.measure.state import fingerprint

__all__ = ["alone", "do", "judge", "main", "train"]

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a cell's file says; return 0, or 2 for what can be said in one sentence."""
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
    """Run a recipe, or go on with it: the one place of this room that starts the engine."""
    if work.job == "probe":
        from foveate.train.probe import probe

        probe(work.settings, folder)
        return
    recipe, path = work.settings, folder / "recipe.yaml"
    resume = any((folder / "checkpoints").glob("update-*.ckpt"))
    if resume:
        # It differs at most in how it writes the start, and a run goes on with its own recipe.
        recipe = config.read(work.recipe_class, path)
    elif _rank() == 0:
        path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    if work.job == "pretrain":
        from foveate.mim.run import pretrain as run
    else:
        from foveate.train.run import train as run  # type: ignore[assignment]
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
    models = {label: open_any(model) for label, model in work.models.items()}
    found = evaluate(models, plan, command=command, progress=progress)
    found.about["settings"] |= {"asked": work.asked, "of": of}
    found.save(folder / "eval.json")
    return found


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock as long as the process lives; ValueError where another one has it.

    Of several processes that do the cell together the first holds it.
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
