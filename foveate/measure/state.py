"""Find out how far each cell is, from its files alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate import config
from foveate.convert import SHIPPED
from foveate.measure.cells import Cell, plain
from foveate.measure.table import Results
from foveate.mim.weights import TEACHER_FILE

__all__ = ["DIFFERS", "DONE", "TODO", "UNFINISHED", "State", "fingerprint", "refuse", "states_of"]

DONE, UNFINISHED, TODO, DIFFERS = "done", "unfinished", "to do", "differs"
_MODELS = ("model.start", "teacher", "distill.teacher")  # settings that may name another cell


@dataclass(frozen=True)
class State:
    """The progress of a cell.

    Attributes:
        kind: "done", "unfinished", "to do", or "differs" if the folder holds something else.
        why: explanation; "" if there is nothing to add.
    """

    kind: str
    why: str = ""


def states_of(cells: Mapping[str, Cell]) -> dict[str, State]:
    """Return how far each cell is; measurements of a model that is gone do not count."""
    found: dict[str, State] = {}
    for name, cell in cells.items():
        lacking = [one for one in cell.needs if found[one].kind != DONE]
        if lacking and cell.evaluates:
            found[name] = State(TODO)
        else:
            found[name] = _evaluated(cell) if cell.evaluates else _trained(cell)
        if lacking and found[name] == State(TODO):
            found[name] = State(TODO, f"after {lacking[0]}")
    return found


def refuse(states: Mapping[str, State]) -> None:
    """Raise ValueError for folders that hold the training of another recipe."""
    wrong = [f"{name}: {state.why}" for name, state in states.items() if state.kind == DIFFERS]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{wrong[0]}{more}; move the folder away to train anew, or take another --out"
        )


def fingerprint(model: str) -> str:
    """Return text that changes whenever the weights do, without reading them."""
    path = Path(model)
    if model in SHIPPED:
        return model
    result = path / "result.json"
    try:
        if result.is_file():  # written last, with the accuracy; copies of a folder agree
            return hashlib.sha256(result.read_bytes()).hexdigest()[:16]
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    except OSError as error:
        raise ValueError(f"{model} cannot be read: {error.strerror}") from error
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _trained(cell: Cell) -> State:
    path = cell.folder / "recipe.yaml"
    if not path.is_file():
        return State(TODO)
    try:
        there: Any = config.read(cell.work.recipe_class, path)
    except ValueError as error:
        return State(DIFFERS, str(error))
    # Read both through the dataclass, so that new settings with defaults do not differ.
    wanted = dict(_leaves(plain(cell.work.settings)))
    found = dict(_leaves(plain(there)))
    for key in _MODELS:
        if _same_model(found.get(key), wanted.get(key), cell.needs):
            found[key] = wanted.get(key)
    for key in dict.fromkeys((*wanted, *found)):
        old, new = found.get(key), wanted.get(key)
        if old != new:
            return State(DIFFERS, f"was trained with {key}={old!r}, the recipe has {new!r}")
    if (cell.folder / "result.json").is_file():
        return State(DONE)
    updates = sorted(
        int(p.stem.rpartition("-")[2]) for p in cell.folder.glob("checkpoints/update-*.ckpt")
    )
    if updates:
        return State(UNFINISHED, f"update {updates[-1]}")
    return State(TODO, "begun, without a checkpoint")


def _evaluated(cell: Cell) -> State:
    path = cell.folder / "eval.json"
    if not path.is_file():
        return State(TODO)
    try:
        settings = Results.load(path, "foveate compare").about["settings"]
    except ValueError as error:
        return State(TODO, str(error).replace(str(path), path.name))
    asked, of = settings.get("asked", {}), settings.get("of", {})
    for key, wanted in cell.work.asked.items():
        if asked.get(key) != wanted:
            return State(TODO, f"was measured with {key}={asked.get(key)!r}")
    for label, model in cell.work.models.items():
        if of.get(label) != fingerprint(model):
            return State(TODO, "the model has changed since")
    return State(DONE)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return dotted keys and values; options and weights of losses are compared whole."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix + key not in (
            "model.options",
            "options",
            "weights",
        ):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _same_model(found: Any, wanted: Any, needs: Sequence[str]) -> bool:
    """Tell whether two paths, absolute or not, mean the same model."""
    if found is None or wanted is None:
        return False
    if Path(found).resolve() == Path(wanted).resolve():
        return True
    # All cells were moved or copied together: the model still lies at the same place among them.
    both = Path(found).as_posix(), Path(wanted).as_posix()
    ends = [f"/{below}{file}" for below in needs for file in ("", f"/{TEACHER_FILE}")]
    return any(all(path.endswith(end) for path in both) for end in ends)
