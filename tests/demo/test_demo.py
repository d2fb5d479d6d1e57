"""The demo: what ships, what it evaluates, and the page it writes."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn

import foveate
from foveate.cli import main
from foveate.core import ReducedViT
from foveate.data.demo import demo_vit
from foveate.demo import run_demo
from foveate.demo.cells import CELLS, TRAINED, Cell, accuracy, build, shipped_images
from foveate.registry import method_class


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return demo_vit()


def test_what_ships_is_small() -> None:
    folder = files("foveate.data").joinpath("files")
    assert len(folder.joinpath("demo_vit.safetensors").read_bytes()) < 5_000_000
    for method, how in TRAINED.items():
        weights = folder.joinpath(f"demo_{method}", "foveate.safetensors").read_bytes()
        assert len(weights) < {"whole": 5_000_000, "gates": 500_000}[how]


LOGS = Path(__file__).parents[2] / "benchmarks" / "results" / "demo_training"


@pytest.mark.parametrize("name", ["finetune-demo_masked", *(f"reduce-demo_{m}" for m in TRAINED)])
def test_what_ships_is_trained_and_its_log_says_how_well(vit: nn.Module, name: str) -> None:
    said = json.loads((LOGS / name / "result.json").read_text())["accuracy"]
    method = name.partition("reduce-demo_")[2]
    cell = Cell(method, "keep=0.7" if method else "")  # by threshold, as it was evaluated
    images, labels = (part[::2] for part in shipped_images())
    found = accuracy(build(cell, vit), images, labels)
    # 1 000 of 10 000 images, weights in half precision
    assert found == pytest.approx(said, abs=2.5)
    assert found > {"": 83, "dynamicvit": 83, "svit": 82, "spvit": 83, "static": 80}[method]


def test_every_method_has_a_cell() -> None:
    assert {cell.method for cell in CELLS} == {"", *foveate.list_methods()}
    needing = {n for n in foveate.list_methods() if method_class(n).gated}
    assert needing == set(TRAINED)


@pytest.mark.parametrize("method", TRAINED)
def test_what_ships_trained_is_loaded(vit: nn.Module, method: str) -> None:
    """The same gates at every rate, and none of them as they were made; whole models are others."""
    torch.manual_seed(0)
    fresh = foveate.apply(vit, method, keep=0.7, check=False)
    cells = [cell for cell in CELLS if cell.method == method]
    states = [build(cell, vit).reducer.state_dict() for cell in cells]
    for name, value in fresh.reducer.state_dict().items():
        assert not torch.equal(value, states[0][name])
        assert all(torch.equal(state[name], states[0][name]) for state in states)


class Seen(HTMLParser):
    """Collects tags and whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value:
                self.fetched.append(value)


def test_the_page_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = tuple({cell.method: cell for cell in CELLS}.values())  # the last one of each method
    monkeypatch.setattr("foveate.demo.run.CELLS", cells)
    rows = run_demo(tmp_path / "deep", batches=(4, 1), rounds=2, images=40)
    assert [row.method for row in rows][:2] == ["dense", "attention(keep=0.5)"]
    assert len(rows) == len(cells)
    for row in rows:
        assert set(row.speed) == {4, 1} and 0 <= row.accuracy <= 100
        assert row.speed[4]["low"] <= row.speed[4]["ratio"] <= row.speed[4]["high"]
    page = (tmp_path / "deep" / "demo.html").read_text(encoding="utf-8")
    seen = Seen()
    seen.feed(page)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in seen.fetched)
    assert "script" not in seen.tags and "link" not in seen.tags
    assert "{{" not in page and seen.tags.count("svg") == 2 and seen.tags.count("table") == 1
    shown = [html.unescape(name) for name in re.findall(r"<code>(.*?)</code>", page)]
    assert shown == [row.method for row in rows]
    record = json.loads((tmp_path / "deep" / "demo.json").read_text())
    assert [r["method"] for r in record["rows"]] == shown
    printed = capsys.readouterr().out
    assert "tome(r=3)" in printed and "demo.html" in printed
    assert not list(tmp_path.glob("deep/*.partial"))


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rounds", "0", "--out", str(tmp_path)]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_a_dense_cell_is_the_model_itself(vit: nn.Module) -> None:
    assert build(CELLS[0], vit) is vit
    model = build(Cell("tome", "r=2"), vit)
    assert isinstance(model, ReducedViT) and model.vit is vit
