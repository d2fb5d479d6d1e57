"""Every command that README and the documentation show is one that the command line takes."""

from __future__ import annotations

import importlib
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest

from foveate import config
from foveate.cli import COMMANDS, main
from foveate.registry import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(rf"^(?:\$ )?foveate ((?:{'|'.join(COMMANDS)})(?: .*)?)$", re.MULTILINE)
WRONG = "optim.lrr"  # a page shows what is said of this mistake


def commands(page: Path) -> list[str]:
    """Return the command lines of a page, without what they print."""
    text = page.read_text(encoding="utf-8")
    found = [line for block in BLOCK.findall(text) for line in COMMAND.findall(block)]
    return [line for line in found if WRONG not in line]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda p: p.stem)
def test_what_a_page_shows_is_taken(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options and methods are read, and recipes that ship with all changes of their settings."""
    for line in commands(page):
        words = shlex.split(line, comments=True)
        taken: list[Namespace] = []
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(f"foveate.cli.{words[0]}"), "run", taken.append)
            assert main(words) == 0, line
        for word in words[1:]:
            if re.fullmatch(r"\w+\(.*\)", word.removeprefix("method=")):
                parse(word.removeprefix("method="))
        (given,) = taken
        check = "--dry-run" if words[0] == "compare" else "--print"
        recipe = vars(given).get("recipe", vars(given).get("config"))
        if recipe is not None and recipe in config.list_recipes(words[0]):
            assert main([*words, check]) == 0, (line, capsys.readouterr().err)


def test_there_are_many() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 100
