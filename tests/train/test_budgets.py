"""Training a method at the rate that meets a budget, which is found once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DATA, LOOP, adapt, checkpoint, reduce, run, small_model
from test_latency import REST, TOKEN, Clock, clock  # noqa: F401  (a fixture)

import foveate
from foveate import latency
from foveate.train import budgets
from foveate.train.budgets import method_of_run, with_method

SHAPE = {"patch_size": 4, "depth": 4}  # 49 patches: whole numbers of tokens come near a budget
WHOLE = REST + TOKEN * 50 * 4  # milliseconds without a method


def train_with(method: str, *overrides: str) -> Any:
    """A run without a teacher."""
    shape = [f"model.options.{name}={value}" for name, value in SHAPE.items()]
    weights = {"kl": 0.0, "token": 0.0} if method == "spvit" else {}
    return reduce(method, *shape, *overrides, weights=weights)


def test_a_time_sets_the_rates_that_gates_are_trained_to_keep(
    clock: Clock,  # noqa: F811
    tmp_path: Path,
) -> None:
    """SPViT's latency-aware training: targets of the ratio loss come from the latency table."""
    said: list[str] = []
    result = run(train_with("spvit", "budget=1.2x faster"), tmp_path / "run", say=said.append)
    found = foveate.load(tmp_path / "run").reducer
    assert found.name == "spvit" and found.gate is None  # they decide for each image
    fixed = foveate.apply(small_model(**SHAPE), "spvit", keep=found.keep, gate="topk").eval()
    reached = clock.ms(latency.partial(fixed, torch.zeros(1, 1, 28, 28)))
    assert abs(reached * 1.2 / WHOLE - 1) < 0.05
    # What stands in the folder is what was trained, and the recipe is as it was given.
    kept = json.loads((tmp_path / "run" / "budget.json").read_text())
    assert kept["budget"] == "1.2x faster" and kept["found"] == repr(found)
    assert method_of_run(train_with("spvit", "budget=1.2x faster"), tmp_path / "run") == repr(found)
    assert "budget   1.2x faster" in said[0] and f"method   {found!r}" in said[0]
    assert result["updates"] == 8


def test_a_resumed_run_keeps_its_rate(
    clock: Clock,  # noqa: F811
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    run(train_with("spvit", "budget=1.2x faster"), out)
    before, measured = foveate.load(out).reducer.keep, clock.measured
    longer = train_with("spvit", "budget=1.2x faster", "loop.epochs=3")
    assert run(longer, out, resume=True)["updates"] == 12
    assert foveate.load(out).reducer.keep == before and clock.measured == measured
    # Another budget, or another method, in the same folder is looked for anew.
    like = train_with("spvit", "budget=1.3x faster")
    other = with_method(small_model(**SHAPE), like.method, like, out).reducer
    assert other.keep < before and clock.measured > measured
    (out / "budget.json").write_text("[]")
    with pytest.raises(ValueError, match="budget.json does not say which rate was found"):
        with_method(small_model(**SHAPE), like.method, like, out)


def test_new_weights_do_not_depend_on_the_search(tmp_path: Path) -> None:
    """The same seed gives the same gates, whether the rate was given or found."""
    model, asked = small_model(**SHAPE), train_with("spvit", "budget=70%")
    torch.manual_seed(3)
    found = with_method(model, asked.method, asked, tmp_path).reducer
    given = reduce(repr(found))
    torch.manual_seed(3)
    again = with_method(model, given.method, given).reducer
    assert foveate.count(foveate.apply(model, found)).macs  # it can be counted
    for name, value in again.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_a_share_of_multiply_adds(tmp_path: Path) -> None:
    recipe = train_with("evit(blocks=(1,))", "budget=80%")
    run(recipe, tmp_path / "run")
    model = foveate.load(tmp_path / "run")
    dense = foveate.count(foveate.unwrap(model)).macs
    assert foveate.count(model).macs / dense == pytest.approx(0.8, abs=0.01)


def test_adapting_and_functions_take_a_budget(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start.safetensors", **SHAPE)
    short = "loop.max_steps=1"
    run(adapt(start, "tome", short, "budget=80%"), tmp_path / "adapted")
    adapted = foveate.load(tmp_path / "adapted").reducer
    assert adapted.r == foveate.apply(small_model(**SHAPE), "tome", budget="80%").reducer.r
    options: dict[str, Any] = {"progress": False, "say": lambda _: None, "out": tmp_path / "own"}
    model = small_model(**SHAPE)
    result = foveate.reduce(
        *(model, "evit(blocks=(1,))", DATA),
        **{"budget": "80%", "loop": {**LOOP, "max_steps": 1}, **options},
    )
    assert result.model.vit is model and 0 < result.model.reducer.keep < 0.7


def test_an_instance_keeps_its_weights(tmp_path: Path) -> None:
    """Also where the rate was found before: by a run that ended before its first step."""
    given = foveate.apply(small_model(**SHAPE), "dynamicvit", blocks=(1,)).reducer
    recipe = reduce("dynamicvit", "budget=80%")
    for _ in ("found", "kept"):
        made = with_method(small_model(**SHAPE), given, recipe, tmp_path).reducer
        assert made.keep != given.keep
        for name, value in given.state_dict().items():
            assert torch.equal(value, made.state_dict()[name]), name


def test_one_process_writes_what_all_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of multiply-adds are the same in all of them, but a file has one writer."""
    monkeypatch.setattr(budgets.rank_zero_only, "rank", 1)
    recipe = train_with("evit(blocks=(1,))", "budget=80%")
    made = with_method(small_model(**SHAPE), recipe.method, recipe, tmp_path).reducer
    assert 0 < made.keep < 0.7 and not (tmp_path / "budget.json").exists()


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        ("evit(keep=0.5)", ["budget=80%"], "give keep or a budget, not both"),
        ("evit", ["budget='80'"], "budget must read like"),
        ("evit", ["budget=0.1%"], "cannot meet"),
        ("ats", ["budget=1.2x faster"], "depends on the images"),
        ("evit", ["budget=1.2x faster", "loop.devices=2"], "2 processes would time it at once"),
    ],
)
def test_refused(
    method: str,
    overrides: list[str],
    words: str,
    clock: Clock,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = train_with(method, *overrides)
    with pytest.raises(ValueError, match=words):
        with_method(small_model(**SHAPE), recipe.method, recipe, tmp_path)
    assert not (tmp_path / "budget.json").exists()
