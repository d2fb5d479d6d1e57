"""What README and the examples show runs, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippets_run(number: int, tmp_path: Path) -> None:
    printed = run("-c", SNIPPETS[number], cwd=tmp_path)
    if number == 0:
        shown = re.search(r"prints\n\n```text\n(.*?)```", README, re.DOTALL)
        assert shown is not None and printed == shown[1]


def test_readme_table_of_methods_is_current() -> None:
    run(str(ROOT / "docs" / "method_table.py"), "--check", cwd=ROOT)


def test_quickstart_example_runs(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "quickstart.py")
    small = ("--model", "deit_tiny_patch16_224", "--batch", "1", "--rounds", "2")
    printed = run(script, *small, cwd=tmp_path)
    assert "tome(r=13)" in printed and "features back on the grid: [1, 196, 192]" in printed


def test_contributing_example_is_a_method_that_works(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@register" in c)
    name = re.search(r'@register\("(\w+)"\)', code)
    assert name is not None
    use = f"""
import timm, torch, foveate
vit = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=3)
model = foveate.apply(vit, "{name[1]}", keep=0.5).eval()
print(model(torch.randn(2, 3, 64, 64)).shape)
"""
    file = tmp_path / "method.py"
    file.write_text(code + use, encoding="utf-8")
    assert "torch.Size([2, 3])" in run(str(file), cwd=tmp_path)
