"""Adapting: it learns without labels, what is frozen stays, and it goes on where it was killed."""

from __future__ import annotations

import json
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import DATA, LOOP, adapt, checkpoint, elsewhere, exported, run, same_run, small_model
from small import hf, vit

import foveate
from foveate.backbones import image_settings, set_image_settings
from foveate.cli import main
from foveate.data import Loader, eval_transform, limited, open_images, open_source
from foveate.data.sources.memory import ArraySource
from foveate.train import adapt as training
from foveate.train.callbacks import Pictures
from foveate.train.logs import read_metrics
from foveate.train.result import Result

QUIET: dict[str, Any] = {"progress": False, "say": lambda _: None}
OWN: dict[str, Any] = {"loop": {**LOOP, "max_steps": 1}, **QUIET}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("start") / "start.safetensors")


def photos(folder: Path, count: int, side: int = 40) -> Path:
    """Images in a folder, without any order."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def rows(out: Path) -> list[dict[str, str]]:
    return [row for row in read_metrics(out / "metrics.csv") if "train/loss" in row]


# It learns, without labels -----------------------------------------------------------------------


def test_it_learns_to_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The demo with a tenth of its tokens, on images whose labels nobody may ask for."""

    def label(self: Any, index: int) -> int:
        raise AssertionError("a label was read")

    monkeypatch.setattr(ArraySource, "label", label)
    settings = ("data.limit=256", "data.batch=32", "data.val_limit=100", "optim.lr=1e-3")
    recipe = adapt("demo", "evit(keep=0.3)", *settings, "loop.epochs=1")
    result = run(replace(recipe, data=replace(recipe.data, mean=None, std=None)), tmp_path)
    assert result["updates"] == 8 and result["score"] == "kl"
    assert result["agreement"] > result["agreement_before"] + 5
    assert result["kl"] < 0.8 * result["kl_before"]
    assert result["cosine"] > result["cosine_before"]
    model = foveate.load(tmp_path)
    assert repr(model.reducer) == "evit(keep=0.3)" and foveate.backbones.class_names(model)
    assert "worse" not in caplog.text


def test_what_is_measured(start: str, tmp_path: Path) -> None:
    """Before training it is what apply gives, and complete agreement where nothing is reduced."""
    loader = Loader(
        limited(open_images("fashion-mnist", "val"), 32, balanced=False),
        eval_transform((28, 28), 1),
        **{"batch": 32, "train": False},
    )
    images = (next(iter(loader))["image"].float() / 255 - 0.286) / 0.353
    plain = foveate.load(start).eval()
    few = foveate.apply(plain, "evit(keep=0.3)")
    with torch.no_grad():
        wanted, got = plain(images), few(images)
        patches = [model.forward_features(images)[:, 1:] for model in (plain, few)]
    likely = wanted.softmax(1)
    expected = {
        "agreement_before": 100 * float((wanted.argmax(1) == got.argmax(1)).float().mean()),
        "kl_before": float((likely * (likely.log() - got.log_softmax(1))).sum(1).mean()),
        "cosine_before": float(torch.cosine_similarity(*patches, dim=-1).mean()),
    }
    result = run(adapt(start, "evit(keep=0.3)", "loop.max_steps=1"), tmp_path / "few")
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    whole = run(adapt(start, "evit(keep=1.0)", "loop.max_steps=1"), tmp_path / "whole")
    assert [whole[name] for name in expected] == pytest.approx([100, 0, 1], abs=1e-4)
    assert float(rows(tmp_path / "whole")[0]["train/loss"]) == pytest.approx(0, abs=1e-5)


def test_a_folder_without_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that was saved with its method, and photographs, in one line."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 40)
    foveate.save(foveate.apply(small_model(), "tome(r=2)"), "tuned", everything=True)
    settings = ("data.batch=8", "loop.epochs=1", "loop.loggers=[]", "data.val_share=0.2")
    assert main(["adapt", "tuned", "--images", "photos", *settings]) == 0
    text = capsys.readouterr().out
    for line in (
        "method   tome(r=2)\n",
        "training images of folder:photos; ",
        "validation images, the model is runs/adapt-folder/model\n",
        "next     foveate export runs/adapt-folder FOLDER --check ",
        "         foveate show runs/adapt-folder --images FOLDER ",
    ):
        assert line in text
    assert re.search(
        r"^agreement \S+ % \(before: \S+ %\), KL \S+ \(before: \S+\), cosine", text, re.M
    )
    written = Path("runs/adapt-folder/recipe.yaml").read_text()
    assert "method: null" in written and "start: tuned" in written
    assert foveate.load("runs/adapt-folder").reducer.config()["r"] == 2
    more = ("adapt", "--resume", "runs/adapt-folder", "loop.epochs=2")
    assert main(more) == 0 and "the model is runs/adapt-folder" in capsys.readouterr().out
    assert main([*more, "--images", "photos"]) == 2
    assert "a run goes on with its own recipe" in capsys.readouterr().err
    # The model's name alone, settings alone, and a recipe of one's own.
    words = ["adapt", "model.start=tuned", "data.train=folder:photos", "--print"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "start: tuned" in text and "name: null" in text and "method: null" in text
    Path("mine.yaml").write_text("model: {start: tuned}\n")
    assert main(["adapt", "mine.yaml", "train=blocks:2", "--print"]) == 0
    assert "train: blocks:2" in capsys.readouterr().out


def test_training_that_does_harm_is_said(
    start: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(adapt(start, "evit(keep=0.7)", "loop.max_steps=2", "optim.lr=1"), tmp_path)
    said = f"the weights of {tmp_path} have a divergence (KL) of "
    assert result["kl"] > result["kl_before"] and said in caplog.text
    assert f"before training it was {result['kl_before']:g}" in caplog.text


@pytest.mark.parametrize(
    ("name", "last", "best", "model", "place"),
    [
        ("kl", 0.5, 0.2, "best/model", "best"),
        ("kl", 0.5, 0.5, "best/model", "."),  # by as much as scores are rounded
        ("cosine", 0.5, 0.8, "best/model", "best"),
        ("cosine", 0.5, 0.5, "model", "."),
    ],
)
def test_the_better_weights_are_named_next(
    name: str,
    last: float,
    best: float,
    model: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As arguments that a shell reads, whatever the folder is called."""
    content: dict[str, Any] = {"score": name, name: last, "model": "model", "splits": {}}
    content |= {"best": {"score": best, "update": 3, "model": model}, "images": {"val": 9}}
    monkeypatch.setattr(training, "adapt", lambda recipe, out, **_: Result(out, content))
    assert main(["adapt", "fashion_part", "--out", "my run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    export, show = (shlex.split(line.removeprefix("next"), comments=True) for line in printed[-2:])
    where = str(Path("my run", place))
    assert export == ["foveate", "export", where, "FOLDER", "--check"]
    assert show[:3] == ["foveate", "show", where]


def test_pictures_of_images_without_labels(tmp_path: Path) -> None:
    """As many as of images with classes, which are then all different."""
    source = open_source(str(photos(tmp_path / "photos", 6)), "all", labels=False)
    assert len(Pictures(tmp_path, 1, source)._images) == 4
    clothes = open_images("fashion-mnist", "val")
    names = Pictures(tmp_path, 1, clothes)._images
    labels = {clothes.label(n) for n in range(len(clothes)) if clothes.name(n) in names}
    assert len(names) == len(labels) == 4


# What is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "moved"),
    [
        ("method", ("reducer.",)),
        ("blocks:1", ("reducer.", "vit.blocks.2.")),
        ("all", ("reducer.", "vit.")),
    ],
)
def test_what_is_frozen_stays(
    train: str, moved: tuple[str, ...], start: str, tmp_path: Path
) -> None:
    method = "dynamicvit(keep=0.5)"
    run(adapt(start, method, f"train={train}", "loop.max_steps=2"), tmp_path)
    torch.manual_seed(0)  # of the new gates, as the run has them
    plain = foveate.load(start)
    before = {f"vit.{key}": value for key, value in plain.state_dict().items()}
    for key, value in exported(tmp_path).items():
        if key.startswith("vit."):
            assert torch.equal(value, before[key]) is not key.startswith(moved), key
    parts = rows(tmp_path)[0]
    whole = sum(float(parts[f"train/{name}"]) for name in ("patches", "prefix", "kl"))
    assert float(parts["train/loss"]) == pytest.approx(
        whole + 2 * float(parts["train/ratio"]), rel=1e-4
    )
    assert "train/token" not in parts and "train/class" not in parts


METHODS = (
    *(
        "random(keep=0.5)",
        "spvit(keep=0.5)",
        "cropr(r=5)",
        "evit(blocks=[0]) + tome(r=2, blocks=[2])",
    ),
    *(
        pytest.param(m, marks=pytest.mark.slow)
        for m in (
            *(
                "svit(keep=0.5)",
                "ats(K=8)",
                "evovit(keep=0.5, aux=True)",
                "static(keep=0.5)",
                "pitome(keep=0.9)",
            ),
            *(
                "tokenmergence(keep=0.5)",
                "evit(keep=0.5, rest='park')",
                "tome(r=3, recall_before='head')",
            ),
        )
    ),
)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, start: str, tmp_path: Path) -> None:
    """Those that learn from labels learn from what the teacher takes for likely."""
    result = run(adapt(start, method, "loop.max_steps=2"), tmp_path)
    assert 0 <= result["agreement"] <= 100 and result["kl"] > 0 and -1 < result["cosine"] < 1
    first = rows(tmp_path)[0]
    own = {"spvit": "ratio", "svit": "ratio", "static": "ratio", "cropr": "aux", "evovit": "aux"}
    wanted = own.get(method.partition("(")[0])
    assert wanted is None or float(first[f"train/{wanted}"]) > 0
    assert all(bool(value.isfinite().all()) for value in exported(tmp_path).values())


# Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dinov2", "hf"])
def test_a_model_without_a_head(form: str, tmp_path: Path) -> None:
    """Its features learn to agree, in place; the best weights are those with the highest cosine."""
    if form == "hf":
        pytest.importorskip("transformers")
        model = hf("Dinov2Model")
    else:
        model = vit(num_classes=0, reg_tokens=4, init_values=1e-5)
    set_image_settings(model, {"crop_pct": 0.95, "interpolation": "bilinear"})
    data = photos(tmp_path / "photos", 24)
    settings: dict[str, Any] = {
        "data": {"train": str(data), "batch": 8, "val_share": 0.3},
        "loop": {**LOOP, "max_steps": 2},
    }
    result = foveate.adapt(model, "evit(keep=0.5)", **settings, out=tmp_path / "run", **QUIET)
    assert result["score"] == "cosine" and "kl" not in result and "agreement" not in result
    first = rows(tmp_path / "run")[0]
    assert {"train/patches", "train/prefix"} <= set(first) and "train/kl" not in first
    assert result.model.vit is model and not model.training
    kept = image_settings(foveate.unwrap(foveate.load(tmp_path / "run")))
    assert kept["crop_pct"] == 0.95 and kept["interpolation"] == "bilinear"


class Sealed(dict):
    """An item of a data set that will not be asked for its label."""

    def __getitem__(self, key: str) -> Any:
        if key != "image":
            raise AssertionError(f"{key} was read")
        return super().__getitem__(key)


@pytest.mark.parametrize("rate", [1e-9, 1e-2])
def test_a_model_that_has_its_method_in_python(rate: float, start: str, tmp_path: Path) -> None:
    """Its parameters are where training begins, and gates alone learn something."""
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    items = [Sealed(image=Image.fromarray(pixels), label=0) for pixels in pictures]
    model = foveate.apply(foveate.load(start), "dynamicvit(keep=0.5)")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings: dict[str, Any] = {"optim": {"lr": rate}, "out": tmp_path, **OWN}
    data = {**DATA, "train": items[:40], "val": items[40:], "limit": None}
    result = foveate.adapt(model, data=data, train="method", **settings)
    moved = {
        key.partition(".")[0]
        for key, value in result.model.state_dict().items()
        if not torch.allclose(value, before[key], rtol=1e-4, atol=1e-6)
    }
    assert moved == ({"reducer"} if rate > 1e-3 else set())


# Killed ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["0,3", "1,2", "val0"])
def test_a_run_that_was_killed(kill: str, start: str, tmp_path: Path) -> None:
    settings = ("loop.save_every=1", "loop.ema=0.8", "train=blocks:2", "optim.lr=3e-3")
    recipe = adapt(start, "dynamicvit(keep=0.5)", *settings)
    assert elsewhere(recipe, tmp_path / "whole") == 0
    out = tmp_path / "run"
    assert elsewhere(recipe, out, kill=kill) == -signal.SIGKILL
    assert elsewhere(recipe, out, resume=True) == 0
    assert same_run(tmp_path / "whole", out)
    one, other = (
        json.loads((path / "result.json").read_text()) for path in (tmp_path / "whole", out)
    )
    names = [name for name in one if name.startswith(("agreement", "kl", "cosine"))]
    assert len(names) == 9 and all(one[name] == other[name] for name in names)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("tome(r=2)", ["train=method"], "tome has nothing to train on this model: train=method le"),
        ("evit", ["train=blocks:4"], "train=blocks:4: the model has 3 blocks"),
        (None, [], "start.safetensors has no method: name one, such as method=evit"),
        (
            "evit",
            ["model.start=demo_dynamicvit"],
            "demo_dynamicvit has its method dynamicvit.*null",
        ),
        ("evit", ["model.start=demo_detector"], "demo_detector is a detector or segmenter: only"),
        (
            "evit",
            ["model.start=null", "model.name=vit_tiny_patch16_224"],
            "has random weights: mod",
        ),
        ("evit", ["model.pool=avg"], "model.pool changes what the model answers"),
        ("evit", ["weights.ratio=2"], "unknown loss of evit 'ratio'"),
        ("dynamicvit", ["weights.token=1"], "unknown loss of dynamicvit 'token'"),
        (
            "evit",
            ["data.batch=65"],
            "a batch of 65 is larger than the training data, which have 64 images",
        ),
        ("evit", [f"weights.{n}=0" for n in ("patches", "prefix", "kl")], "all have the weight 0"),
    ],
)
def test_refused_before_the_first_step(
    method: str | None, settings: list[str], words: str, start: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        run(adapt(start, method, *settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train=gates", "train must be method, all or blocks:N from 1, got 'gates'"),
        ("train=blocks:0", "train must be method, all or blocks:N from 1, got 'blocks:0'"),
        ("data.val=none", "data.val=none: agreement is measured on validation images"),
        ("weights.kl=-1", "weights.kl must be at least 0, got -1"),
        ("method.keep=0.5", "method.name must say which method"),
    ],
)
def test_refused_settings(setting: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapt("demo", None, setting)


def test_refused_images(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    photos(tmp_path / "one", 1)
    words = ["adapt", start, "method=evit", "data.batch=4", "--images"]
    for folder, said in (
        ("empty", "empty"),
        ("nowhere", "nowhere does not exist; a folder of images is needed"),
        ("one", "has 1 image: to divide it into training and validation two that differ"),
    ):
        assert main([*words, folder]) == 2
        assert said in capsys.readouterr().err
    assert main(["adapt", "fashion_prt"]) == 2
    assert (
        "no recipe of that name (see --list), and fashion_prt is neither" in capsys.readouterr().err
    )
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
