"""One comparison that is run once; tests change copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import Here, compare, write_config

from foveate.compare.launch import Process


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    here = Here()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Process, "run", lambda self: here.run(self))
        assert compare(write_config(folder), "--out", folder / "out") == 0
    return folder


@pytest.fixture
def config(_finished: Path) -> Path:
    return _finished / "tiny.yaml"


@pytest.fixture
def out(_finished: Path, tmp_path: Path) -> Path:
    """A copy, somewhere else than where it was made."""
    return Path(shutil.copytree(_finished / "out", tmp_path / "out"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """What runs cells in this process."""
    found = Here()
    monkeypatch.setattr(Process, "run", lambda self: found.run(self))
    return found
