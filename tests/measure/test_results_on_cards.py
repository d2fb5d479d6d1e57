"""What foveate eval measured of a saved model goes on its card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import foveate
from foveate.convert import note_results, open_base
from foveate.convert.record import read_record
from foveate.measure import Evaluation
from foveate.measure.table import one

METHOD = "dynamicvit(keep=0.7)"


@pytest.fixture(scope="module")
def found() -> Evaluation:
    model = open_base("demo_dynamicvit")
    asked = {"limit": 60, "batch": 60, "speed": (2,), "rounds": 3, "device": "cpu"}
    return foveate.evaluate({"mine": model, "its twin": model}, "fashion-mnist", **asked)


@pytest.fixture
def folders(found: Evaluation, tmp_path: Path) -> tuple[Path, Path]:
    foveate.save(open_base("demo_dynamicvit"), tmp_path / "mine", everything=True)
    found.save(tmp_path / "results" / "eval.json")
    return tmp_path / "mine", tmp_path / "results"


def test_scores_and_speed_are_on_the_card(folders: tuple[Path, Path], found: Evaluation) -> None:
    model, results = folders
    for _ in range(2):  # a later evaluation takes the place of the former
        note_results(model, results)
    card = ModelCard((model / "README.md").read_text(encoding="utf-8"))
    keys = {"run": "mine", "method": METHOD}
    top1 = one(found.table, "top1", part="accuracy", **keys)
    times = one(found.table, "times", part="speed", **keys)
    (first, second) = card.data.eval_results
    assert (first.metric_name, second.metric_name) == ("top-1 accuracy", "top-5 accuracy")
    assert first.metric_value == pytest.approx(top1, abs=1e-4) and first.dataset_split == "test"
    assert f"| top-1 accuracy | {top1:.6g} % | 60 test images of `fashion-mnist`; " in card.text
    assert f"| speed, batch 2 | {times:.2f} times as fast as without the method" in card.text
    assert "3 interleaved rounds" in card.text and "not measured" not in card.text
    assert "validation" not in card.text
    assert foveate.load(model).reducer.name == "dynamicvit"


def test_a_new_model_in_the_folder_has_no_results(folders: tuple[Path, Path]) -> None:
    model, results = folders
    note_results(model, results)
    foveate.save(open_base("demo_dynamicvit"), model, everything=True)
    assert read_record(model) is None and "not measured" in (model / "README.md").read_text()


def test_results_of_something_else_are_refused(
    folders: tuple[Path, Path], found: Evaluation, tmp_path: Path
) -> None:
    model, results = folders
    foveate.save(open_base("demo_dynamicvit"), tmp_path / "third", everything=True)
    with pytest.raises(ValueError, match="several models .*its twin, mine; evaluate third alone"):
        note_results(tmp_path / "third", results)
    foveate.save(foveate.apply(open_base("demo"), "evit"), tmp_path / "other", everything=True)
    with pytest.raises(ValueError, match=r"no numbers of a model with evit\(keep=0.7\)"):
        note_results(tmp_path / "other", results)
    foveate.save(open_base("demo_dynamicvit"), tmp_path / "mine" / "best", everything=True)
    single = Evaluation(found.table[found.table["run"] == "mine"], found.about)
    single.save(tmp_path / "last" / "eval.json")
    with pytest.raises(ValueError, match="has numbers of mine, not of mine-best"):
        note_results(tmp_path / "mine" / "best", tmp_path / "last")
    with pytest.raises(ValueError, match="has no eval.json"):
        note_results(model, tmp_path)
    table = (results / "eval.csv").read_text().splitlines()
    (results / "eval.csv").write_text("\n".join(table[:-2]))
    with pytest.raises(ValueError, match="was cut short or changed"):
        note_results(model, results)
    (results / "eval.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="is not what this version of foveate eval writes"):
        note_results(model, results)
