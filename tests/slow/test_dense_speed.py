"""The script that measures dense models runs through, on models too small to say anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foveate.measure import Results, one, select

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_level_gives_rows(dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    script = ROOT / "benchmarks" / "dense_speed.py"
    command = [sys.executable, str(script), "--quick", "--dtypes", dtype, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = Results.load(out, "dense_speed.py").table
    for level in ("blocks", "backbone", "network"):
        run = f"vit_adapter_tiny {level}, {dtype}"
        names = set(select(table, run=run, metric="times")["method"])
        assert {"", "dense again", "svit"} <= names
    packed = select(table, run=f"vit_adapter_tiny packed, {dtype}", metric="times")
    assert list(packed["method"]) == ["svit, one by one", "svit, one by one again", "svit, packed"]
    parts = select(table, run=f"vit_adapter_tiny parts, {dtype}", part="parts", method="svit")
    named = dict(zip(parts["metric"], parts["value"], strict=True))
    outer = ("stem", "injectors", "extractors", "embedding", "blocks", "rest")
    assert sum(named[name] for name in outer) == pytest.approx(named["all"], rel=0.2)
    assert 0 < one(parts, "gates") < 1
