"""What README, the documentation and the examples show runs, and prints what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import foveate

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.compile(r"^```python(?: title=\"(.*?)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)
TUTORIAL = "adding-a-method.md"

# What an example is run with so that it is quick, and what it must print.
EXAMPLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "quickstart.py": (
        ("--model", "deit_tiny_patch16_224", "--batch", "1", "--rounds", "2"),
        ("tome(r=13)", "features back on the grid: [1, 196, 192]"),
    ),
}


def run(*command: str, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run code in this process, which has the imports behind it, as a script in a folder."""
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def snippets(text: str) -> list[tuple[str, str]]:
    """Title and code of every Python block of a page."""
    return [(title or "", code) for title, code in CODE.findall(text)]


# README ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(snippets(README))))
def test_readme_snippets_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = snippets(README)[number][1]
    if number > 0:
        run_here(code, tmp_path, monkeypatch)
    else:
        printed = run("-c", code, cwd=tmp_path)
        shown = re.search(r"prints\n\n```text\n(.*?)```", README, re.DOTALL)
        assert shown is not None and printed == shown[1]


def test_readme_table_of_methods_is_current() -> None:
    run(str(DOCS / "method_table.py"), "--check", cwd=ROOT)


# Pages -------------------------------------------------------------------------------------------

# What these show is in default tests too: of detectors, exports and tuning.
LONG_PAGES = {"dense.md", "faster-detector.md", "export.md", "tune.md"}
PAGES = sorted(page.name for page in DOCS.glob("*.md") if snippets(page.read_text("utf-8")))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in LONG_PAGES else ())
        for page in PAGES
        if page != TUTORIAL
    ],
)
def test_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later blocks build on earlier ones, as a reader does."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if "import transformers" in text or "from transformers" in text:
        pytest.importorskip("transformers")
    run_here("\n".join(code for _, code in snippets(text)), tmp_path, monkeypatch)


def test_the_tutorial_makes_a_method_that_keeps_the_promises(tmp_path: Path) -> None:
    """The method, its use, its contract row and its own test, as the page has them."""
    parts = dict(snippets((DOCS / TUTORIAL).read_text(encoding="utf-8")))
    method, use = parts["foveate/methods/norm.py"], parts[""]
    row = parts["tests/contract/table.py"].strip()
    check = f"""
from contract.table import FORMS, G, P, Row
from contract.test_methods import test_modes_agree, test_rows_stand_alone_and_batches_permute
for form in ("vit", "dinov2_reg4", "dinov3"):
    test_modes_agree({row}, form)
    test_rows_stand_alone_and_batches_permute({row}, form)
"""
    own = parts["tests/methods/test_norm.py"]
    called = "\n".join(f"{name}()" for name in re.findall(r"^def (test_\w+)", own, re.MULTILINE))
    (tmp_path / "norm.py").write_text(method, encoding="utf-8")
    (tmp_path / "use.py").write_text(f"import norm\n{use}\n{check}\n{own}\n{called}\n", "utf-8")
    tests = ROOT / "tests"
    printed = run(str(tmp_path / "use.py"), cwd=tmp_path, path=(tests, tests / "contract"))
    assert called and printed.startswith("norm(keep=0.5) on timm VisionTransformer")


# Examples ----------------------------------------------------------------------------------------


# Their steps are in tests/train and on the pages about training and detection too.
LONG = {"detect.py", "pretrain.py", "train.py"}
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize(
    "example",
    [pytest.param(s, marks=pytest.mark.slow if s in LONG else ()) for s in SCRIPTS],
)
def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = EXAMPLES.get(example, ((), ()))
    path = ROOT / "examples" / example
    code = path.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    if "@register" in code:  # other tests shall not meet the method that it makes
        printed = run(str(path), *arguments, cwd=tmp_path)
    else:
        printed = run_here(code, tmp_path, monkeypatch)
    assert printed and all(text in printed for text in expected)


# The site ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["ats evit", pytest.param("", marks=pytest.mark.slow)])
def test_every_method_has_a_page(names: str) -> None:
    """All of them are made where the site is built."""
    pytest.importorskip("yaml")
    pages = "{n: m.method_page(n) for n in names} | {'index': m.index_page()}"
    code = f"names = {names.split()} or foveate.list_methods(); print(json.dumps({pages}))"
    code = f"import json, foveate, method_pages as m; {code}"
    # In a process of its own: modules of the documentation have names that modules of tests have.
    method_pages = json.loads(run("-c", code, cwd=ROOT, path=(DOCS,)))
    for name in names.split() or foveate.list_methods():
        page = method_pages[name]
        for part in ("<svg", "Paper: ", "## When to take it", "## Options", "GMACs"):
            assert part in page, f"{name} has no {part}"
        described = re.findall(r"^\| `(\w+)` \| <code>.*\| (.*) \|$", page, re.MULTILINE)
        undescribed = [option for option, words in described if not words.strip()]
        assert not undescribed, f"{name}: {undescribed} are not in a docstring"
        assert f"]({name}.md)" in method_pages["index"]


def test_when_to_take_it_is_said_of_methods_that_exist() -> None:
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load((DOCS / "when.yml").read_text(encoding="utf-8"))
    assert sorted(said) == foveate.list_methods()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: a dead link, a missing anchor or a page outside the navigation fails."""
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python", "matplotlib"):
        if importlib.util.find_spec(needed.partition(".")[0]) is None:
            pytest.skip(f"{needed} is not installed: pip install 'foveate[docs]'")
    site = tmp_path / "site"
    run("-m", "mkdocs", "build", "--strict", "--site-dir", str(site), cwd=ROOT)
    for name in foveate.list_methods():
        assert (site / "methods" / f"{name}.html").is_file()
    # Readable without a network: what a page loads comes from the site.
    loads = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"')
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page
