"""The package as users get it: wheel and sdist are built, looked into, installed and used.

Each is installed into a new virtual environment. So that torch is not downloaded anew, that one
sees the packages of this environment through a line in a .pth file. Such a line adds a folder to
the end of the path and nothing else: .pth files in that folder, such as that of an editable
foveate, are not read. That all of foveate comes from the new environment is asserted.
FOVEATE_WHOLE_ENV=1 installs everything anew instead, which takes minutes and gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHOLE = bool(os.environ.get("FOVEATE_WHOLE_ENV"))
USE = """
import sys
from pathlib import Path

import timm
import torch

import foveate
from foveate.convert import open_base

vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
model = foveate.apply(vit, "evit(keep=0.5)").eval()
assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
assert open_base("demo_dynamicvit")(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
foveate.save(model, "saved", everything=True)
assert Path("saved/README.md").is_file() and foveate.load("saved").reducer.name == "evit"
files = {Path(m.__file__) for n, m in sys.modules.items() if n.partition(".")[0] == "foveate"}
assert len(files) > 50 and all(file.is_relative_to(sys.prefix) for file in files), files
"""

pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path) -> str:
    """Run a program that sees nothing of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel that is made from it, and the wheel that the checkout itself gives."""
    for needed in ("build", "hatchling"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", folder / "both", ROOT, cwd=folder)
    run(*build, "--wheel", "--outdir", folder / "direct", ROOT, cwd=folder)
    (wheel,), (sdist,) = (folder / "both").glob("*.whl"), (folder / "both").glob("*.tar.gz")
    (direct,) = (folder / "direct").glob("*.whl")
    return {"wheel": wheel, "sdist": sdist, "direct": direct}


def in_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def in_sdist(path: Path) -> set[str]:
    with tarfile.open(path) as file:
        return {one.name.partition("/")[2] for one in file.getmembers() if one.isfile()}


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the project is known to git alone, and this is no checkout")
    return set(run("git", "ls-files", cwd=ROOT).splitlines())


def test_the_sdist_holds_what_git_does(built: dict[str, Path]) -> None:
    """All but the settings of editors and machines, and nothing else."""
    known, found = tracked(), in_sdist(built["sdist"])
    assert found - known == {"PKG-INFO"}
    assert {name for name in known - found if not name.startswith(".")} == set()
    for name in ("tests/slow/test_package.py", "docs/sharing.md", "mkdocs.yml", "LICENSE"):
        assert name in found


def test_the_wheel_holds_the_package_alone(built: dict[str, Path]) -> None:
    found, package = in_wheel(built["wheel"]), {n for n in tracked() if n.startswith("foveate/")}
    about = {name for name in found if ".dist-info/" in name}
    assert set(found) - about == package
    for name in ("foveate/py.typed", "foveate/recipes/pipeline/fashion_part.yaml"):
        assert name in found
    licenses = {name.partition("/licenses/")[2] for name in about} - {""}
    assert licenses == {"LICENSE", "foveate/data/files/LICENSE.fashion-mnist"}
    assert built["wheel"].stat().st_size < 20e6


def test_the_sdist_builds_the_same_wheel(built: dict[str, Path]) -> None:
    assert built["wheel"].name == built["direct"].name
    assert in_wheel(built["wheel"]) == in_wheel(built["direct"])


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_runs(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    bin = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python, options = bin / "python", ["--no-deps", "--ignore-installed", "--no-build-isolation"]
    if WHOLE:
        options = []
    else:
        paths = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path)
        packages = sysconfig.get_paths()["purelib"]
        Path(paths.strip(), "packages.pth").write_text(f"{packages}\n", encoding="utf-8")
    run(python, "-m", "pip", "install", "--quiet", *options, built[kind], cwd=tmp_path)
    version = built["wheel"].name.split("-")[1]
    assert run(bin / "foveate", "--version", cwd=tmp_path) == f"foveate {version}\n"
    assert "push" in run(bin / "foveate", "--help", cwd=tmp_path)
    assert "dynamicvit" in run(bin / "foveate", "list", cwd=tmp_path)
    described = run(bin / "foveate", "describe", "demo", "evit(keep=0.7)", cwd=tmp_path)
    assert "tokens per block: 50 50 50 " in described
    run(python, "-c", USE, cwd=tmp_path)
