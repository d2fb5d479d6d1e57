"""Decide what the page may open: models that ship, names of timm, and files in given folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from foveate.convert import SHIPPED
from foveate.convert.dense import DENSE
from foveate.convert.folders import CONFIG
from foveate.convert.named import check_name

__all__ = ["RECIPE", "Places", "tables_of"]

RECIPE = "recipe.yaml"  # tells the folder of a run from others
_DEEP, _MOST = 4, 200  # how many levels of folders are searched, how many entries are listed


class Places:
    """The folders that were given, and what may be opened in them.

    Attributes:
        roots: the folders, without symbolic links.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]] = ()) -> None:
        """Take folders; ValueError if a path is not a folder."""
        for folder in folders:
            if not Path(folder).is_dir():
                raise ValueError(f"--folders takes folders, but {folder} is not one")
        self.roots = tuple(dict.fromkeys(Path(folder).resolve() for folder in folders))

    def inside(self, given: str) -> Path:
        """Return the path of what a user named; ValueError unless it lies in the given folders.

        A relative path begins at one of those folders. Links are followed, and must not lead out
        of those folders.
        """
        text = given.strip()
        if not text or "\0" in text:
            raise ValueError("choose a folder, or type its path")
        for root in self.roots:
            found = (root / text).resolve()  # an absolute path replaces the root
            if self._holds(found) and found.exists():
                self._check_links(found)
                return found
        # The sentence is the same whether the path exists or not, so it reveals nothing.
        where = ", ".join(map(str, self.roots)) or "none: start foveate app with --folders"
        raise ValueError(f"{text} is not in the folders that this page may open ({where})")

    def model(self, given: str) -> str:
        """Return the name that ``open_base`` takes for the model that a user named."""
        name = given.strip()
        if name in SHIPPED:
            return name
        path = Path(name)
        if path.name != name or name == ".." or any((root / name).exists() for root in self.roots):
            return str(self.inside(name))
        check_name(name)
        if path.exists():
            raise ValueError(f"{name} is a path here, but not in the given folders")
        return name

    def models(self, *, dense: bool) -> list[tuple[str, str]]:
        """Return the labels and paths of detectors and segmenters, or of the other models."""
        return self._listed(lambda path: _kind(path) == ("dense" if dense else "plain"))

    def reports(self) -> list[tuple[str, str]]:
        """Return the labels and paths of runs, and of folders with a table of measurements."""
        return self._listed(lambda path: (path / RECIPE).is_file() or bool(tables_of(path)))

    def _holds(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.roots)

    def _check_links(self, path: Path) -> None:
        for place, folders, files in os.walk(path):
            for one in (Path(place, name) for name in (*folders, *files)):
                if one.is_symlink() and not self._holds(one.resolve()):
                    raise ValueError(f"{one} is a link out of the folders that this page may open")

    def _listed(self, wanted: Callable[[Path], bool]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for root in self.roots:
            for folder in _folders(root):
                if len(found) == _MOST:
                    return found
                if wanted(folder):
                    found.append((str(Path(root.name) / folder.relative_to(root)), str(folder)))
        return found


def tables_of(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that have a table beside them."""
    return sorted(path for path in folder.glob("*.json") if path.with_suffix(".csv").is_file())


def _folders(root: Path) -> Iterator[Path]:
    """Yield a folder and those below it, but neither hidden ones nor the inside of a model."""
    for place, folders, files in os.walk(root):
        path = Path(place)
        yield path
        model = _kind(path) is not None and RECIPE not in files
        deep = len(path.relative_to(root).parts) >= _DEEP
        folders[:] = [] if model or deep else sorted(f for f in folders if not f.startswith("."))


def _kind(folder: Path) -> str | None:
    """Return "dense" or "plain" for the folder of such a model; None for other folders."""
    run = (folder / RECIPE).is_file() or (folder.parent / RECIPE).is_file()
    if run and folder.name != "model" and (folder / "model").is_dir():
        return "dense" if (folder / "model" / DENSE).is_file() else "plain"
    if run and (folder / "model.safetensors").is_file():
        return "plain"
    if run:
        return None
    if (folder / DENSE).is_file():
        return "dense"
    ours = (folder / CONFIG).is_file()
    return "plain" if ours or (folder / "config.json").is_file() else None
