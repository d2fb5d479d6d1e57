"""Find what a pre-training run has kept in its folder: its recipe, and weights by epoch."""

from __future__ import annotations

import re
from pathlib import Path

from foveate import config
from foveate.files import read_json
from foveate.measure.style import evenly
from foveate.mim.recipe import Pretrain
from foveate.mim.weights import method_of, options_of, rest_path
from foveate.train.recipe import Model

__all__ = ["choose", "locate", "name_files", "read_recipe", "weights_kept"]

_RECIPE, _FINAL, _RESULT = "recipe.yaml", "model.safetensors", "result.json"
_KIND, _REST = ".safetensors", ".pretrain.safetensors"
_MOST = 6  # default number of snapshots


def locate(path: Path) -> tuple[Path, Path | None]:
    """Return the folder with the recipe, and the file if a single one was named.

    A file without a recipe stands for its folder too.
    """
    if path.is_dir():
        if not (path / _RECIPE).is_file():
            raise ValueError(f"{path} is not the folder of a run: it has no {_RECIPE}")
        return path, None
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected the folder of a pre-training run")
    if path.suffix != _KIND:
        raise ValueError(f"{path} is neither the folder of a run nor a {_KIND} file of its weights")
    if path.name.endswith(_REST):  # the other file of the two
        path = path.with_name(path.name.removesuffix(_REST) + _KIND)
    for folder in (*path.parents, *path.absolute().parents):
        if (folder / _RECIPE).is_file():
            return folder, path
    if rest_path(path).is_file():  # a run of its own, such as convert --pretraining writes
        return path, path
    raise ValueError(
        f"{path} has no {_RECIPE} in the folders above it and no {rest_path(path).name} beside it: "
        "weights of the encoder alone do not do"
    )


def read_recipe(folder: Path) -> Pretrain:
    """Return the recipe of a pre-training run, or of a file of weights."""
    if folder.is_file():
        start = Model(start=str(folder))
        return Pretrain(method=method_of(folder), options=options_of(folder), model=start)
    try:
        return config.read(Pretrain, folder / _RECIPE)
    except ValueError as error:
        raise ValueError(f"{folder} holds no pre-training that can be read: {error}") from error


def weights_kept(folder: Path, recipe: Pretrain) -> dict[float, Path]:
    """Return the files of weights by epochs of training, in order."""
    kept: dict[float, Path] = {}
    for path in (folder / "snapshots").glob(f"epoch-*{_KIND}"):
        if found := re.fullmatch(rf"epoch-(\d+){re.escape(_KIND)}", path.name):
            kept[float(found[1])] = path
    if (folder / _FINAL).is_file():  # the same as a snapshot of that epoch, if there is one
        kept[_ended(folder, recipe)] = folder / _FINAL
    return dict(sorted(kept.items()))


def _ended(folder: Path, recipe: Pretrain) -> float:
    """Return the number of epochs of a run, fewer than the recipe's if its steps were limited."""
    result = folder / _RESULT
    if result.is_file():  # written after the weights
        found = read_json(result, "")
        if isinstance(found, dict) and isinstance(found.get("epochs"), (int, float)):
            return float(found["epochs"])
    return float(recipe.loop.epochs)


def choose(
    folder: Path, kept: dict[float, Path], epochs: tuple[float, ...] | None
) -> dict[str, tuple[float | None, Path]]:
    """Return the weights to look at, by label."""
    if not kept:
        raise ValueError(
            f"{folder} holds no weights yet: the run has not ended, and keeps none meanwhile "
            "unless its recipe says snapshots=..."
        )
    for epoch in epochs or ():
        if epoch not in kept:
            one = "weights after epoch" if len(kept) == 1 else "those after epochs"
            known = ", ".join(f"{known:g}" for known in kept)
            raise ValueError(f"{folder} has kept no weights after epoch {epoch:g}; {one} {known}")
    if epochs is None:
        wanted = list(kept)
    elif epochs:
        wanted = sorted(set(epochs))
    else:
        *before, last = kept
        wanted = [*evenly(before, _MOST), last]
    return {f"epoch {epoch:g}": (epoch, kept[epoch]) for epoch in wanted}


def name_files(files: list[Path], kept: dict[float, Path]) -> dict[str, tuple[float | None, Path]]:
    """Return files that were named one by one; those of a run are labelled by epoch."""
    by_file = {path.absolute(): epoch for epoch, path in kept.items()}
    found: dict[str, tuple[float | None, Path]] = {}
    for file in files:
        epoch = by_file.get(file.absolute())
        found[file.stem if epoch is None else f"epoch {epoch:g}"] = (epoch, file)
    return dict(sorted(found.items(), key=lambda one: (one[1][0] is None, one[1][0] or 0.0)))
