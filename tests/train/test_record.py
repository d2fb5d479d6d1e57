"""What a run leaves beside its models: records and cards with its scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
from huggingface_hub import ModelCard

import foveate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best weights are not its last."""
    out = tmp_path_factory.mktemp("run") / "evit-run"
    runs.run(
        runs.reduce("evit(keep=0.7)", "loop.epochs=3", "optim.lr=0.05", "data.val_limit=150"), out
    )
    assert (out / "best").is_dir()
    return out


@pytest.mark.parametrize("weights", ["last", "best"])
def test_cards_have_the_scores_of_their_own_weights(run: Path, weights: str) -> None:
    result = json.loads((run / "result.json").read_text())
    folder = run / ("model" if weights == "last" else "best/model")
    reached = result["accuracy"] if weights == "last" else result["best"]["score"]
    assert result["accuracy"] != result["best"]["score"]
    card = ModelCard((folder / "README.md").read_text())
    scores = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert scores["top-1 accuracy"] == reached
    assert ("top-5 accuracy" in scores) == (weights == "last")
    assert card.data.datasets == ["zalando-datasets/fashion_mnist"]
    assert card.data.model_name == ("evit-run" if weights == "last" else "evit-run-best")
    updates = result["updates"] if weights == "last" else result["best"]["update"]
    for words in (
        f"| top-1 accuracy | {reached:g} % | 150 validation images of `fashion-mnist`",
        "held out of its training images (share 0.1, seed 0)",
        "seed of training 0",
        f"{updates} updates of 16 images",
        "from random weights",
        f"These are the {weights} weights",
        "| speed | not measured |",
    ):
        assert words in card.text
    assert ("which also chose these weights" in card.text) == (weights == "best")


def test_a_record_has_the_recipe(run: Path) -> None:
    record = json.loads((run / "model" / "record.json").read_text())
    assert record["recipe"]["method"] == "evit(keep=0.7)"
    assert record["result"]["machine"]["torch"] and "accuracy" not in record["result"]


def test_both_models_load(run: Path) -> None:
    for folder in (run, run / "best", run / "model", run / "best" / "model"):
        assert repr(foveate.load(folder).reducer) == "evit(keep=0.7)"
