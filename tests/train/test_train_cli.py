"""The commands from end to end, and what comes out of them, on the images that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from runs import TREE, finetune, reduce, run
from safetensors import safe_open
from small import hf

import foveate
from foveate import config
from foveate.cli import main
from foveate.data import (
    Inputs,
    Preprocessing,
    eval_transform,
    limited,
    open_images,
)
from foveate.data.loader import Loader
from foveate.train.finetune import FinetuneTask
from foveate.train.logs import read_metrics
from foveate.train.reduce import ReduceTask

TINY = (
    *("data.limit=64", "data.val_limit=32", "data.batch=16", "data.val_batch=16"),
    *("loop.loggers=[]", "loop.log_every=1"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs lie below the folder that a command is given in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that runs export, as they are in memory."""
    found: list[Any] = []
    for task in (FinetuneTask, ReduceTask):
        original = task.export

        def export(self: Any, model: Any, folder: Path, original: Any = original) -> Path:
            found.append(model)
            return original(self, model, folder)

        monkeypatch.setattr(task, "export", export)
    return found


def command(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if code else out


def pixels() -> torch.Tensor:
    """Images that evaluation sees, as bytes."""
    loader = Loader(
        limited(open_images("fashion-mnist", "val"), 8, balanced=False),
        eval_transform((28, 28), 1),
        **{"batch": 8, "train": False},
    )
    return next(iter(loader))["image"]


def same_answers(folder: Path, model: Any) -> Any:
    """What ``foveate.load`` gives answers as the model in memory did."""
    loaded = foveate.load(folder).eval()
    prepared = Preprocessing.of(loaded)
    assert prepared.mean == pytest.approx((0.286,)) and prepared.std == pytest.approx((0.353,))
    images = (pixels().float() / 255 - prepared.mean[0]) / prepared.std[0]
    with torch.no_grad():
        answers = [x if torch.is_tensor(x) else x.logits for x in (loaded(images), model(images))]
    assert torch.equal(*answers)
    return loaded


def test_the_whole_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[Any]
) -> None:
    base, gated = tmp_path / "runs/finetune-fashion_part_full", tmp_path / "gated"
    options = "model.options.depth=3"
    said = command(capsys, "finetune", "fashion_part_full", *TINY, options, "loop.epochs=1")
    result = json.loads((base / "result.json").read_text())
    told = f"accuracy {result['accuracy']:.2f} % of 32 validation images, the model is runs/finet"
    assert told in said and "next     foveate eval runs/finetune-fashion_part_full    #" in said
    for line in (
        "model    vit_tiny_patch16_224, 0.3 million parameters\n",
        "images   2433 training images of fashion-mnist; 567 for validation, held out of them by c",
        "classes  10: T-shirt, trousers, pullover, dress, coat, ...\n",
        "device   cpu, precision 32\nrun      1 epochs, 16 images an update\nfolder   runs/",
    ):
        assert line in said
    assert result["updates"] == 4 and result["images"] == {"train": 64, "val": 32, "unreadable": 0}
    assert result["machine"]["device"] == "cpu" and result["machine"]["torch"]
    written = yaml.safe_load((base / "recipe.yaml").read_text())
    assert written["data"]["limit"] == 64 and written["model"]["options"]["depth"] == 3
    same_answers(base, trained[0])

    # timm takes the file as its own.
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **written["model"]["options"],
        num_classes=10,
        checkpoint_path=str(base / "model.safetensors"),
    )
    with safe_open(base / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
    assert model.load_state_dict(state, strict=True) and model(torch.zeros(1, 1, 28, 28)).numel()
    assert all(torch.equal(v, trained[0].state_dict()[k]) for k, v in model.state_dict().items())

    start = ("model.start=runs/finetune-fashion_part_full", "loop.epochs=1")
    words = ("reduce", "fashion_part_dynamicvit", *TINY, *start, "--out", str(gated))
    assert "the model is" in command(capsys, *words)
    assert same_answers(gated, trained[1]).reducer.config()["keep"] == 0.7
    rows = [row for row in read_metrics(gated / "metrics.csv") if "train/loss" in row]
    parts = {name: float(rows[0][f"train/{name}"]) for name in ("class", "ratio", "kl", "token")}
    whole = parts["class"] + 2 * parts["ratio"] + 0.5 * parts["kl"] + 0.5 * parts["token"]
    assert float(rows[0]["train/loss"]) == pytest.approx(whole, rel=1e-4)

    assert f"{gated} holds a run already: --resume" in command(capsys, *words, code=2)
    assert "the model is" in command(capsys, "reduce", "--resume", str(gated))
    text = command(capsys, "reduce", "--resume", str(gated), "optim.lr=1", code=2)
    assert "a run goes on with its own recipe: foveate reduce --resume FOLDER, and a" in text

    for path in (base, gated):  # of a reduced model the backbone is probed
        settings = [text for text in TINY if "loop" not in text]
        name = f"model.start={path}"
        text = command(capsys, "probe", "fashion_part", name, *settings, "epochs=2", "neighbours=5")
        assert (
            "5 nearest neighbours: " in text and "linear: " in text and "of 32 test images" in text
        )
    assert (tmp_path / "runs/probe-fashion_part/result.json").is_file()
    text = command(capsys, "probe", "fashion_part", name, "--out", str(gated), code=2)
    assert f"{gated} holds a training run: the results of a probe go elsewhere" in text


@pytest.mark.parametrize("job", ["finetune", "reduce", "probe"])
def test_lists_and_printed_recipes(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = command(capsys, job, "--list")
    for name in config.list_recipes(job):
        assert name in text.replace("\n", "")
    name = config.list_recipes(job)[0]
    printed = yaml.safe_load(command(capsys, job, name, "model.weights=ema", "--print"))
    assert printed["model"]["weights"] == "ema"
    assert f"name a recipe; foveate {job} --list shows" in command(capsys, job, code=2)
    text = command(capsys, job, "data.batch=3", name, code=2)
    assert "the recipe comes first, then settings" in text
    text = command(capsys, job, name, "data.bach=3", code=2)
    assert "unknown setting 'data.bach'; did you mean 'data.batch'?" in text
    assert not Path("runs").exists()


def test_a_recipe_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({**TREE, "method": "evit"}))
    assert "unknown setting 'method'" in command(capsys, "finetune", "mine.yaml", code=2)
    assert "runs/reduce-mine/model" in command(capsys, "reduce", "mine.yaml", "loop.max_steps=1")


def test_mixed_precision(tmp_path: Path, trained: list[Any]) -> None:
    """Weights stay whole; what is exported is in float32."""
    losses: dict[str, list[float]] = {}
    for precision in ("32", "bf16-mixed"):
        recipe = finetune(
            f"loop.precision={precision}", "loop.max_steps=2", masking={"ratios": [0.5]}
        )
        rows = read_metrics(run(recipe, tmp_path / precision).path / "metrics.csv")
        losses[precision] = [float(row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses["32"] == pytest.approx(losses["bf16-mixed"], rel=0.02)
    assert losses["32"] != losses["bf16-mixed"]
    trained.clear()
    masked = finetune("loop.precision=bf16-mixed", "loop.max_steps=2", masking={"ratios": [0.5]})
    gated = reduce("svit(keep=0.5)", "loop.precision=bf16-mixed", "loop.max_steps=2")
    for number, recipe in enumerate((masked, gated)):
        run(recipe, tmp_path / str(number))
        assert {v.dtype for v in trained[number].state_dict().values()} == {torch.float32}
        same_answers(tmp_path / str(number), trained[number])


def test_a_model_of_transformers(tmp_path: Path, trained: list[Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = hf("ViTForImageClassification", num_channels=1, image_size=28, patch_size=7)
    model.save_pretrained(tmp_path / "hf")
    start = {"start": str(tmp_path / "hf")}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = ("loop.epochs=1", "data.augment.interpolation=bilinear")
    recipe = finetune(*settings, model=start, masking={"ratios": [0, 0.5]})
    assert run(recipe, tmp_path / "run")["model"] == "model"
    loaded = same_answers(tmp_path / "run", trained[0])
    assert type(loaded) is type(model)
    moved = [
        key for key, value in loaded.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert len(moved) == len(before)  # the head too
    inputs = Inputs.of(loaded)
    assert inputs.crop_pct == 0.875 and inputs.interpolation == "bilinear"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run" / "model")
    assert list(processor.image_mean) == [0.286] and processor.crop_size["height"] == 28
    gated = reduce("dynamicvit", "loop.max_steps=1", model={"start": str(tmp_path / "run")})
    run(gated, tmp_path / "gated")
    same_answers(tmp_path / "gated", trained[1])


def test_lv_vit_by_name(tmp_path: Path, trained: list[Any]) -> None:
    options = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 3}
    model = {"name": "lvvit_s", "options": {**options, "num_heads": 2}}
    run(finetune("loop.max_steps=1", model=model, masking={"ratios": [0.5]}), tmp_path / "run")
    same_answers(tmp_path / "run", trained[0])
    gated = reduce("dynamicvit", model={"start": str(tmp_path / "run")})
    gated.loop.max_steps, gated.token_loss = 1, "kl"
    run(gated, tmp_path / "gated")
    same_answers(tmp_path / "gated", trained[1])


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    from runs import exported

    for name in ("false", "true"):
        recipe = finetune(
            *(f"model.checkpointing={name}", "loop.max_steps=2", "model.drop_path=0.2"),
            masking={"ratios": [0.5]},
        )
        run(recipe, tmp_path / name)
    one, other = exported(tmp_path / "false"), exported(tmp_path / "true")
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-6, rtol=1e-4)
