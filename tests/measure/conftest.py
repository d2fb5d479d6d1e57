"""One comparison that is run once, whose copies tests change; what quick runs leave out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from quick_runs import on_the_cpu, quick
from tiny import Here, compare, write_config

from foveate.measure import launch

__all__ = ["on_the_cpu", "quick"]


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    here = Here()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run_cell", here.run)
        assert compare(write_config(folder), "--out", folder / "out") == 0
    return folder


@pytest.fixture
def config(_finished: Path) -> Path:
    return _finished / "tiny.yaml"


@pytest.fixture
def finished(_finished: Path) -> Path:
    """The comparison itself with its report, for tests that change nothing."""
    return _finished / "out"


@pytest.fixture
def out(_finished: Path, tmp_path: Path) -> Path:
    """A copy, somewhere else than where it was made."""
    return Path(shutil.copytree(_finished / "out", tmp_path / "out"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """What runs cells in this process."""
    found = Here()
    monkeypatch.setattr(launch, "run_cell", found.run)
    return found
