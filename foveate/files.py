"""Files that are written whole or not at all, folders for results, and JSON with clear errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["FreeNames", "made_folder", "read_json", "write_text", "write_whole"]


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write to a temporary file beside it and rename, so that a killed run leaves no half file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(str(partial))
        partial.chmod(mode)  # as for other new files; safetensors allows only the owner
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


@contextmanager
def made_folder(folder: Path | None) -> Iterator[None]:
    """Make the folder of a result before the work that fills it; None makes nothing.

    An unwritable place is thus refused at once. If the work fails, the folders that were made
    and are still empty are removed again.
    """
    if folder is None:
        yield
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}") from error
    try:
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):  # it has files now
                place.rmdir()
        raise


def read_json(path: Path, absent: str) -> Any:
    """Read JSON; raise ValueError with the sentence ``absent`` if the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(absent) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error


class FreeNames:
    """Gives out file names once each, because several folders may hold files of the same name."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __len__(self) -> int:
        return len(self._taken)

    def free(self, stem: str) -> str:
        """Return the stem, with a number added if the name is taken."""
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        return name
