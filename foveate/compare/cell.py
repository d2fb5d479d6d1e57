"""One cell in a process of its own: ``python -m foveate.compare.cell FILE``.

A cell looks for itself whether it begins or goes on, so it can be started again at any time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveate import config
from foveate.compare.cells import EVALUATE, Work, read_work
from foveate.compare.state import fingerprint

__all__ = ["do", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a cell's file says; gives 0, or 2 for what can be said in one sentence."""
    (name,) = sys.argv[1:] if argv is None else argv
    path = Path(name)
    try:
        with _alone(path):
            do(read_work(path), path.parent)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def do(work: Work, folder: Path) -> None:
    """Train, or evaluate, in a folder."""
    if work.job == EVALUATE:
        _evaluate(work, folder)
    else:
        _train(work, folder)


def _train(work: Work, folder: Path) -> None:
    from foveate.train.run import train

    if (folder / "result.json").is_file():
        return
    recipe, path = work.settings, folder / "recipe.yaml"
    resume = any((folder / "checkpoints").glob("update-*.ckpt"))
    if resume:
        # It differs at most in how it writes the start, and a run goes on with its own recipe.
        recipe = config.read(work.recipe_class, path)
    else:
        path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    train(recipe, folder, resume=resume, progress=False)


def _evaluate(work: Work, folder: Path) -> None:
    import torch

    from foveate.bench import machine
    from foveate.evaluate import Plan, evaluate
    from foveate.train.build import open_start

    assert work.model is not None
    of = fingerprint(work.model)
    device = work.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in work.asked.items()
    }
    plan = Plan(**given, device=device, workers=work.workers)
    model = open_start(work.model).eval()
    report = evaluate({"model": model}, plan, command=machine.command("foveate.compare.cell"))
    report.settings |= {"asked": work.asked, "of": of}
    report.save(folder / "eval.json")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock as long as the process lives; ValueError where another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows
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
