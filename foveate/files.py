"""Files that are written whole or not at all, and JSON that is read with clear errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["FreeNames", "read_json", "write_text", "write_whole"]


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write to a neighbour and rename, so that a killed run leaves no half file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(str(partial))
        partial.chmod(mode)  # as other new files: safetensors writes for its owner alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def read_json(path: Path, absent: str) -> Any:
    """Read JSON; ValueError with the sentence ``absent`` where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(absent) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error


class FreeNames:
    """Names of files that were not given yet: folders may hold files of one name."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __len__(self) -> int:
        return len(self._taken)

    def free(self, stem: str) -> str:
        """Return the name, with a number behind it where it is taken."""
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        return name
