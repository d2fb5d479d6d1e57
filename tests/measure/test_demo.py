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

import foveate
from foveate import config
from foveate.cli import main
from foveate.convert import SHIPPED, open_shipped
from foveate.data import fashion_mnist_mini, normalise
from foveate.measure import Results, accuracy, one, select, variants
from foveate.measure.comparison import Comparison
from foveate.measure.dense import evaluate_dense
from foveate.measure.run import Plan
from foveate.registry import method_class, parse

TRAINED = {
    name.removeprefix("demo_"): how for name, how in SHIPPED.items() if how in ("whole", "gates")
}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return config.read(Comparison, config.find_recipe("compare", "demo"))


def test_what_ships_is_small() -> None:
    folder = files("foveate.data").joinpath("files")
    assert len(folder.joinpath("demo_vit.safetensors").read_bytes()) < 5_000_000
    for method, how in TRAINED.items():
        weights = folder.joinpath(f"demo_{method}", "foveate.safetensors").read_bytes()
        assert len(weights) < {"whole": 5_000_000, "gates": 500_000}[how]
    detector = folder.joinpath("demo_detector", "dense.safetensors").read_bytes()
    assert len(detector) < 5_000_000


LOGS = Path(__file__).parents[2] / "benchmarks" / "results" / "demo_training"


@pytest.mark.slow  # five passes over 2000 images; the demo's own page shows the same models
@pytest.mark.parametrize("name", ["finetune-demo_masked", *(f"reduce-demo_{m}" for m in TRAINED)])
def test_what_ships_is_trained_and_its_log_says_how_well(name: str) -> None:
    logged = json.loads((LOGS / name / "result.json").read_text())["accuracy"]
    method = name.partition("reduce-demo_")[2]
    model = open_shipped(f"demo_{method}" if method else "demo")
    if method:  # by threshold, as it was evaluated
        text = f"{method}(keep=0.7)"
        model = variants(model, [text])[text]
    images, labels = (part[::2] for part in fashion_mnist_mini("test"))
    batches = [(normalise(images), labels, torch.arange(len(labels)))]
    found = accuracy(model, lambda: batches).top1
    # 1 000 of 10 000 images, weights in half precision
    assert found == pytest.approx(logged, abs=2.5)
    assert found > {"": 83, "dynamicvit": 83, "svit": 82, "spvit": 83, "static": 80}[method]


@pytest.mark.slow
def test_the_detector_that_ships_finds_what_its_log_says() -> None:
    """On 200 of its 500 test scenes, weights in half precision."""
    logged = Results.load(LOGS.parent / "scenes" / "detect_svit" / "eval.json", "foveate eval")
    plan = Plan(data="scenes:size=64,test=500,clutter=0.3", split="test", limit=200, batch=20)
    found = evaluate_dense({"model": open_shipped("demo_detector")}, plan)
    for method in ("", "svit(keep=0.7)"):
        mine, theirs = (
            one(results.table, "box_ap", part="dense", method=method) for results in (found, logged)
        )
        assert mine == pytest.approx(theirs, abs=0.05) and mine > 0.1


def test_every_method_is_shown(comparison: Comparison) -> None:
    shown = {name: list(comparison.entry(name).variants) for name in comparison.models}
    methods = {name: {parse(text).name for text in texts} for name, texts in shown.items()}
    assert set.union(*methods.values()) == set(foveate.list_methods())
    # What needs training is shown trained, and on its own model.
    needing = {name for name in foveate.list_methods() if method_class(name).gated}
    assert needing == set(TRAINED) and not needing & methods["demo"]
    assert all(methods[f"demo_{method}"] == {method} for method in TRAINED)


@pytest.mark.parametrize("method", TRAINED)
def test_what_ships_trained_is_loaded(comparison: Comparison, method: str) -> None:
    """The same gates at every rate, and none of them as they were made; whole models are others."""
    torch.manual_seed(0)
    demo = open_shipped("demo")
    fresh = foveate.apply(demo, method, keep=0.7, check=False)
    given = open_shipped(f"demo_{method}")
    texts = comparison.entry(f"demo_{method}").variants
    found = variants(given, texts)
    states = [found[repr(parse(text))].reducer.state_dict() for text in texts]
    for name, value in fresh.reducer.state_dict().items():
        assert not torch.equal(value, states[0][name])
        assert all(torch.equal(state[name], states[0][name]) for state in states)
    backbone = foveate.unwrap(given).state_dict()
    same = all(torch.equal(value, backbone[name]) for name, value in demo.state_dict().items())
    assert same == (TRAINED[method] == "gates")


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
    small = tmp_path / "small.yaml"
    small.write_text(
        "data: fashion-mnist\n"
        "models:\n"
        "  demo: {open: demo, variants: [evit(keep=0.5), tome(r=3)]}\n"
        "  demo_svit: {open: demo_svit, variants: ['svit(keep=0.7)', \"svit(gate='topk')\"]}\n"
        "evaluate: {together: true, speed: [4, 1], limit: 20, batch: 20, statistics: false}\n"
    )
    monkeypatch.setattr(config, "find_recipe", lambda job, name: small)
    monkeypatch.setattr("foveate.measure.dense._TIMED", 1)
    out = tmp_path / "deep"
    assert main(["demo", "--rounds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "svit(keep=0.7, gate='topk')" in printed and f"{out / 'demo.html'}" in printed
    results = Results.load(out / "demo.json")
    timed = select(results.table, part="speed", metric="times")
    # One interleaved run for each batch size, all models in it.
    assert len(timed) == 2 * (3 + 3) and set(timed["at"]) == {4, 1}
    page = (out / "demo.html").read_text(encoding="utf-8")
    seen = Seen()
    seen.feed(page)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in seen.fetched)
    assert "script" not in seen.tags and "link" not in seen.tags
    assert "{{" not in page and seen.tags.count("svg") == 2
    first, scores, times = re.findall("<table.*?</table>", page, re.DOTALL)
    rows = [re.findall("<td[^>]*>(.*?)</td>", row) for row in first.split("<tr")[2:]]
    shown = [html.unescape(method) for _, method, *_ in rows]
    assert shown == [
        *("dense", "evit(keep=0.5)", "tome(r=3)", "dense"),
        *("svit(keep=0.7)", "svit(keep=0.7, gate='topk')"),
    ]
    # The detector beside itself without its method, and four pictures of what it finds.
    for table in (scores, times):
        assert re.findall('<td class="words">(dense|svit.*?)</td>', table) == [
            "dense",
            "svit(keep=0.7)",
        ]
    assert "box AP" in scores and page.count("What the detector found in a scene") == 4
    assert one(results.table, "images", run="demo_detector", part="dense", method="") == 4
    assert len(list((out / "scenes").glob("*.png"))) == 4
    timed_rows = [row for row in page.split("<tr")[2:] if 'class="slow"' in row]
    assert all(">dense</td>" not in row for row in timed_rows)
    assert "1 (1)" not in page and not list(out.glob("**/*.partial"))


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rounds", "0", "--out", str(tmp_path)]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err
