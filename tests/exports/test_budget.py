"""``foveate.export(..., budget=...)``: the rate that meets a time in the runtime."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import randomise, vit

import foveate
from foveate import timing
from foveate.cli import main
from foveate.exports import budget
from foveate.exports.make import _Writer

REST, TOKEN, OWN = 1.0, 0.1, 0.8  # milliseconds: of all but blocks, a token in one, a method
WHOLE = REST + TOKEN * 37 * 4


class Runtime:
    """A runtime whose times follow from tokens alone.

    Attributes:
        times: those that were given, in their order.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def open(self, model: Any, about: dict[str, Any], folder: Path, *_: Any) -> Callable[..., Any]:
        """Stand in for ``_Writer.open``."""
        tokens = [37] * 4
        if isinstance(model, foveate.core.ReducedViT):
            tokens = [counts[0] for counts in model.trace(torch.zeros(1, 3, 48, 48)).counts()]
        ms = REST + TOKEN * sum(tokens) + OWN * (min(tokens) < 37)
        return lambda pixels: ms

    def timed(self, calls: dict[str, Callable[[], float]]) -> dict[str, float]:
        """Stand in for the clock."""
        found = {name: call() for name, call in calls.items()}
        self.times += [ms for name, ms in found.items() if name == "method"]
        return found


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(_Writer, "open", lambda _, *words: found.open(*words))
    monkeypatch.setattr(budget, "_timed", found.timed)
    return found


def with_method(method: str) -> foveate.core.ReducedViT:
    model = foveate.apply(randomise(vit()).eval(), method)
    randomise(model.reducer, seed=1)
    return model


def test_threads_of_one_session_rest_while_another_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rested: list[bool] = []

    def measured(calls: dict[str, Callable[[], Any]], **settings: Any) -> timing.Timings:
        rested.append(settings["settle"])
        return timing.measure(calls, **settings)

    monkeypatch.setattr("foveate.latency.measure", measured)
    found = budget._timed({"quick": lambda: time.sleep(0.005), "slow": lambda: time.sleep(0.02)})
    assert rested == [True] and found["slow"] > found["quick"]


@pytest.mark.parametrize(
    ("method", "time", "goal"),
    [
        ("evit", "1.25x faster", WHOLE / 1.25),
        pytest.param("tome(r=0)", "13 ms", 13, marks=pytest.mark.slow),
        pytest.param("dynamicvit(keep=0.9)", "12.5 ms, batch 2", 12.5, marks=pytest.mark.slow),
        pytest.param("svit", "1.2x faster", WHOLE / 1.2, marks=pytest.mark.slow),
    ],
)
def test_a_time_is_met(
    method: str, time: str, goal: float, runtime: Runtime, tmp_path: Path
) -> None:
    """Also with a method's own work; trained parts stay, and gates keep a number of tokens."""
    model = with_method(method)
    before = repr(model.reducer)
    found = foveate.export(model, tmp_path / "out", format="pt2", budget=time)
    assert min(abs(ms / goal - 1) for ms in runtime.times) < 0.05
    assert sum(found.tokens) < 37 * 4 and repr(model.reducer) == before
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["method"] != before and about["method"] in found.notes[-1]
    assert "was set to meet" in found.notes[-1] and "torch" in found.notes[-1]
    exported = foveate.apply(model.vit, about["method"]).eval()
    exported.reducer.load_state_dict(model.reducer.state_dict())
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        ours = exported(images).numpy()
    assert found.open()(images.numpy())[0] == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "time", "options", "words"),
    [
        ("evit", "60%", {}, "foveate.apply takes budgets of multiply-adds"),
        ("evit", "12 ms, bf16", {}, "float32, or in 8 bits with int8"),
        ("evit", "12 ms, batch 8", {"batch": 4}, "is for a batch of 8, and the fixed batch is 4"),
        ("evit(blocks=[1]) + tome(r=1, blocks=[2])", "12 ms", {}, "one method"),
        (None, "12 ms", {}, "this model has none"),
        ("evit", "60 ms", {}, "which is within 60 ms"),
        ("evit", "9x faster", {}, "cannot meet"),
        ("ats", "1.2x faster", {}, "a different number of tokens in each image"),
    ],
)
def test_what_no_rate_meets(
    method: str | None,
    time: str,
    options: dict[str, Any],
    words: str,
    runtime: Runtime,
    tmp_path: Path,
) -> None:
    model = vit().eval() if method is None else with_method(method)
    with pytest.raises(ValueError, match=words):
        foveate.export(model, tmp_path / "out", format="pt2", budget=time, **options)
    assert not (tmp_path / "out" / "model.json").exists()


def test_the_command(runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "demo", "evit", str(tmp_path), "--format", "pt2", "--budget", "1 s"]
    assert main(words) == 2
    assert "without a method, which is within 1000 ms" in capsys.readouterr().err
