"""Runs: what they leave, what goes on from it, killed and parallel ones, what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from masked_models import OPTIONS, TREE, elsewhere, recipe, run
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from train.runs import DATA, MODEL, checkpoint, exported, finetune, same_run, together, watched

import foveate
from foveate import config
from foveate.backbones import image_settings
from foveate.cli import main
from foveate.data import device_batches, eval_transform, limited, open_images
from foveate.data.loader import Loader
from foveate.mim import callbacks as pretrain_callbacks
from foveate.mim.masks import Hiding
from foveate.mim.method import MaskedImageModel, fixed_mask
from foveate.mim.models import make_masked_model
from foveate.mim.recipe import Pretrain
from foveate.mim.task import PretrainTask
from foveate.mim.weights import load_weights, rest_path, save_model
from foveate.train.draws import Draws
from foveate.train.logs import read_metrics
from foveate.train.models import open_start
from foveate.train.probe import probe
from foveate.train.recipe import Probe
from foveate.train.run import train

PROBE: dict[str, Any] = {
    **{"data": "fashion-mnist", "limit": 64, "val_limit": 32, "feature": "avg", "epochs": 4},
    **{"neighbours": 5, "every": 1},
}
SIMMIM: dict[str, Any] = {"method": "simmim", "options": {}, "mask": {"kind": "random"}}
BEIT: dict[str, Any] = {
    "name": "beit_base_patch16_224",
    "pool": "token",
    "options": {
        **MODEL["options"],
        **{"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1},
    },
}

TAUGHT: dict[str, dict[str, Any]] = {
    "bootmae": {"method": "bootmae", "options": OPTIONS["bootmae"]},
    "conmim": {
        **{"method": "conmim", "options": OPTIONS["conmim"], "model": BEIT},
        "mask": {"kind": "random"},
    },
}


def rest(out: Path) -> dict[str, Tensor]:
    """Decoder, head and mask token of a run."""
    return load_file(out / "model.pretrain.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def whole_state(out: Path) -> dict[str, Tensor]:
    return {**{f"vit.{key}": value for key, value in exported(out).items()}, **rest(out)}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[MaskedImageModel]:
    """The models that runs export, as they are in memory."""
    found: list[MaskedImageModel] = []
    original = PretrainTask.export

    def export(self: PretrainTask, model: Any, folder: Path) -> Path:
        found.append(model)
        return original(self, model, folder)

    monkeypatch.setattr(PretrainTask, "export", export)
    return found


# Recipes that ship -------------------------------------------------------------------------------

SHIPPED = config.list_recipes("pretrain")


def opened(name: str) -> Pretrain:
    return config.read(Pretrain, config.find_recipe("pretrain", name))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_written_as_it_is_read(name: str) -> None:
    found = opened(name)
    again = config.parse(Pretrain, yaml.safe_load(config.dump(found)))
    assert again == found and config.dump(again) == config.dump(found)
    assert len(config.headers("pretrain")[name]) > 20
    assert f"pretrain {name}" in config.find_recipe("pretrain", name).read_text()


def shrunk(found: Pretrain) -> Pretrain:
    """The recipe as it is, on a small model and a few of the images that ship."""
    channels = len(found.data.mean or ())
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": channels}
    if "img_size" not in found.model.options:
        small |= {"img_size": 64, "patch_size": 8}
    options = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
    options |= {"projector_width": 32, "projector_out": 16}
    data = {"train": "fashion-mnist", "batch": 8, "val_batch": 8, "workers": 0, "limit": 16}
    return dataclasses.replace(
        found,
        model=replace(found.model, options={**found.model.options, **small}),
        options={key: options.get(key, value) for key, value in found.options.items()},
        data=replace(found.data, **data, val_limit=8),
        loop=replace(found.loop, epochs=1, log_every=1, loggers=(), strategy="auto"),
        probe=replace(
            found.probe, data=found.probe.data and "fashion-mnist", limit=32, val_limit=8, epochs=2
        ),
    )


# Like others but for the size or the data: their files are read above all the same.
ALIKE = {
    *(f"cifar10_{method}" for method in ("bootmae", "conmim", "mae", "simmim")),
    *(f"fashion_{method}" for method in ("bootmae", "conmim", "simmim")),
    *("imagenet_bootmae_l_repo", "imagenet_conmim_l_repo", "imagenet_mae_l_repo"),
    *("imagenet_bootmae_b_mto_paper", "imagenet_mae_l_mto_paper"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in SHIPPED],
)
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    found = opened(name)
    small = shrunk(found)
    for part in ("method", "mask", "mto", "optim", "snapshots", "layers_every"):
        assert getattr(small, part) == getattr(found, part)
    result = run(small, tmp_path)
    assert result["job"] == "pretrain" and result["updates"] == 2
    assert result["loss"] > 0
    assert ("probe/linear" in result) == (found.probe.data is not None)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "train/loss" in row]
    # The hidden patches' spread, or what is left of it: neither learnt in two steps nor exploding.
    # BootMAE weighs it by up to 2, and ConMIM begins above log N, 16 numbers telling little apart.
    own = "train/contrast" if found.method == "conmim" else "train/pixel"
    most = 8 if found.method in TAUGHT else 5
    assert len(rows) == 2 and all(0.1 < float(row[own]) < most for row in rows)
    assert ("train/feature" in rows[0]) == (found.method == "bootmae")
    teacher = tmp_path / "teacher.safetensors"
    assert teacher.exists() == (found.method in TAUGHT)
    for file in (tmp_path / "model.safetensors", teacher):
        if file.exists():  # both say how they take images
            said = image_settings(open_start(str(file)))
            assert said["mean"] == list(small.data.mean or ()), file
    assert ("train/mto_r" in rows[1]) == (found.mto is not None)
    assert all(bool(value.isfinite().all()) for value in whole_state(tmp_path).values())


# What a run leaves -------------------------------------------------------------------------------


def test_a_whole_run(
    tmp_path: Path, trained: list[MaskedImageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots, columns and pictures; the progress curve is of the mean, which is exported."""
    measured: list[dict[str, Tensor]] = []
    original = pretrain_callbacks.read

    def noting(model: Any, *others: Any) -> Any:
        measured.append({key: value.clone() for key, value in model.state_dict().items()})
        return original(model, *others)

    monkeypatch.setattr(pretrain_callbacks, "read", noting)
    out = tmp_path / "run"
    settings = ("loop.epochs=3", "loop.ema=0.9", "loop.pictures_every=2", "snapshots=[1,3]")
    mine = recipe(*settings, "layers_every=2", "probe.every=2", probe={**PROBE}, mto={"ramp": 0.5})
    result = run(mine, out)
    assert json.loads((out / "result.json").read_text()) == result
    assert result["model"] == "model.safetensors" and result["updates"] == 12
    assert result["images"] == {"train": 64, "val": 32, "unreadable": 0}
    assert result["loss"] > 0 and result["loss_without_ema"] > 0 and "accuracy" not in result

    # The exported weights are the mean's, and so are the last numbers of the curve.
    assert same(measured[-1], exported(out)) and len(measured) == 2  # after epochs 2 and 3
    assert same(exported(out), trained[0].vit.state_dict())
    last = load_file(next(iter((out / "snapshots").glob("epoch-0003.safetensors"))))
    assert same(last, exported(out))
    state = torch.load(max((out / "checkpoints").iterdir()), weights_only=True)["state_dict"]
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(state[f"task.model.vit.{name}"], exported(out)[name])

    names = [path.name for path in sorted((out / "snapshots").iterdir())]
    wanted = [f"epoch-000{n}.{kind}safetensors" for n in (1, 3) for kind in ("pretrain.", "")]
    assert names == wanted
    drawn = sorted(path.name for path in (out / "pictures").iterdir())
    assert drawn == ["epoch-002.png", "epoch-003.png"]
    with Image.open(out / "pictures" / "epoch-002.png") as drawn:
        assert drawn.width > 4 * 112 and drawn.height > 6 * 112

    rows = read_metrics(out / "metrics.csv")
    for key in (
        "probe/knn",
        "probe/linear",
        "heterogeneity/00",
        "heterogeneity/02",
        "cosine/visible",
    ):
        found = [(row["epoch"], row["step"]) for row in rows if key in row]
        assert found == [("1", "7"), ("2", "11")], key
    assert "heterogeneity/03" not in {key for row in rows for key in row}
    curve = [float(row["probe/knn"]) for row in rows if "probe/knn" in row]
    assert curve[-1] == pytest.approx(result["probe/knn"], rel=1e-5)
    read = [float(row["probe/linear"]) for row in rows if "probe/linear" in row]
    assert read[-1] == pytest.approx(result["probe/linear"], rel=1e-5)
    assert [row["epoch"] for row in rows if "val/loss_ema" in row] == ["0", "1", "2"]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 12
    for number, row in enumerate(steps):  # weights grow over half of the run
        parts = sum(float(row[f"train/mto_{name}"]) for name in ("spa", "e", "r"))
        wanted = float(row["train/pixel"]) + 0.1 * min(1, number / 6) * parts
        assert float(row["train/loss"]) == pytest.approx(wanted, rel=1e-4)

    # The curve's numbers are what the probe gives of the exported file.
    reading = {
        key: value
        for key, value in PROBE.items()
        if key not in ("data", "limit", "val_limit", "every")
    }
    tree = {**reading, "model": {"start": str(out)}, "data": {**DATA, "batch": 256}, "split": "val"}
    again = probe(config.parse(Probe, tree), tmp_path / "probe")
    assert again["knn"] == result["probe/knn"] and again["linear"] == result["probe/linear"]


def test_the_loss_of_evaluation_is_of_the_exported_model(
    tmp_path: Path, trained: list[MaskedImageModel]
) -> None:
    """With the same masks every time, which are not those of training."""
    result = run(recipe("loop.epochs=1"), tmp_path)
    source = limited(open_images("fashion-mnist", "val"), 32, balanced=False)
    transform = eval_transform((28, 28), 1)
    loader = Loader(source, transform, batch=16, train=False)
    losses, drawn = [], Hiding(kind="random", ratio=0.75)
    with torch.no_grad():
        for index, (x, *_) in enumerate(device_batches(loader, (0.286,), (0.353,), "cpu")):
            hiding = fixed_mask(trained[0], x, drawn, 0, index)
            assert torch.equal(hiding.hidden, fixed_mask(trained[0], x, drawn, 0, index).hidden)
            assert not torch.equal(
                hiding.hidden, drawn.draw(16, (4, 4), (7, 7), Draws(0, 0, index)).hidden
            )
            losses.append(trained[0](x, hiding).losses["pixel"])
    assert result["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_patience_needs_validation() -> None:
    with pytest.raises(ValueError, match="loop.patience waits for validation scores"):
        recipe("loop.patience=2", "data.val=none")


def test_snapshots_every_so_many_epochs(tmp_path: Path) -> None:
    run(recipe("loop.epochs=4", "snapshots=2", "data.limit=16"), tmp_path)
    names = {path.name.split(".")[0] for path in (tmp_path / "snapshots").iterdir()}
    assert names == {"epoch-0002", "epoch-0004"}


def test_collapsed_tokens_raise_the_alarm_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that sees nothing but its own bias: all visible tokens are the same."""
    mine = recipe("layers_every=1", "optim.lr=1e-9", "loop.epochs=2", **SIMMIM, mto={})
    model = make_masked_model(mine)
    with torch.no_grad():
        model.vit.patch_embed.proj.weight.zero_()
        model.vit.patch_embed.proj.bias.fill_(0.5)
    save_model(model, tmp_path / "start.safetensors")
    mine.model.start = str(tmp_path / "start.safetensors")
    with caplog.at_level(logging.WARNING, "foveate"):
        run(mine, tmp_path / "run")
    said = [r.message for r in caplog.records if "mean cosine" in r.message]
    assert len(said) == 1 and "after epoch 1 " in said[0]
    assert "above 0.95" in said[0] and "mto.detach_visible=true" in said[0]


def test_images_without_labels(tmp_path: Path) -> None:
    """A flat folder will do, and nothing need be held out of it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        Image.new("L", (40, 32), 12 * number).save(folder / f"{number}.png")
    data = {**DATA, "train": f"folder:{folder}", "limit": None, "val_limit": None}
    whole = {**data, "val": "none"}
    result = run(recipe("loop.epochs=1", "layers_every=1", data=whole), tmp_path / "run")
    assert result["images"] == {"train": 20, "val": 0, "unreadable": 0} and "loss" not in result
    assert exported(tmp_path / "run")
    result = run(recipe("loop.epochs=1", data=data), tmp_path / "watched")
    counts = result["images"]
    assert counts["train"] + counts["val"] == 20 and counts["val"] > 0 and result["loss"] > 0


# What goes on from it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind, of two updates."""
    root = tmp_path_factory.mktemp("begun")
    trees: dict[str, Any] = {
        "mae": {},
        "simmim": {**SIMMIM, "model": {**MODEL, "pool": "token"}},
        "beit": {**SIMMIM, "model": BEIT},
        **TAUGHT,
    }
    for name, parts in trees.items():
        run(recipe("loop.max_steps=2", "snapshots=1", "data.limit=32", **parts), root / name)
    return {name: root / name for name in trees}


def timms(name: str) -> Any:
    """The plain model that an export is for."""
    if name not in ("beit", "conmim"):
        return timm.create_model(MODEL["name"], num_classes=0, **MODEL["options"])
    options = {**BEIT["options"], "use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
    return timm.create_model(BEIT["name"], num_classes=0, global_pool="token", **options)


@pytest.mark.parametrize("name", ["mae", "simmim", "beit", *TAUGHT])
def test_exports_are_timms(name: str, begun: dict[str, Path], tmp_path: Path) -> None:
    """To the key; and they compute what was pre-trained."""
    out, model = begun[name], timms(name)
    model.load_state_dict(exported(out), strict=True)
    mine = config.read(Pretrain, out / "recipe.yaml")
    ours = make_masked_model(mine)
    load_weights(ours, out / "model.safetensors")
    loaded = foveate.load(out)
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        wanted = ours.eval().vit.forward_features(x)
        for plain in (model, loaded):
            found = plain.eval().forward_features(x)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    if name in ("beit", "conmim"):
        assert ours.vit.rel_pos_bias is not None and loaded.rel_pos_bias is None
    result = train(
        finetune("loop.max_steps=2", model={"start": str(out)}), tmp_path, progress=False
    )
    assert result["updates"] == 2
    tuned = exported(tmp_path)
    assert tuned.keys() >= exported(out).keys() - {"norm.weight", "norm.bias"}
    assert any(key.startswith("head.") for key in tuned)
    key = "blocks.0.attn.qkv.weight"
    assert 0 < (tuned[key] - exported(out)[key]).abs().max() < 0.02


@pytest.mark.parametrize("name", ["mae", "simmim", "beit", *TAUGHT])
@pytest.mark.parametrize("part", ["", "model.safetensors", "snapshots/epoch-0001.safetensors"])
def test_going_on_from_a_run(name: str, part: str, begun: dict[str, Path], tmp_path: Path) -> None:
    """Decoder, head and mask token come along."""
    mine = config.read(Pretrain, begun[name] / "recipe.yaml")
    mine.model.start = str(begun[name] / part)
    state = make_masked_model(mine).state_dict()
    assert all(torch.equal(state[key], value) for key, value in rest(begun[name]).items())
    vit = {key: value for key, value in exported(begun[name]).items() if "relative" not in key}
    assert all(torch.equal(state[f"vit.{key}"], value) for key, value in vit.items())
    assert state.keys() >= rest(begun[name]).keys() | {f"vit.{key}" for key in vit}
    if name in ("beit", "conmim"):
        table = "relative_position_bias_table"
        shared = state[f"vit.rel_pos_bias.{table}"]
        assert torch.equal(shared, exported(begun[name])[f"blocks.1.attn.{table}"])
        assert f"vit.blocks.1.attn.{table}" not in state
    if not part:
        assert run(mine, tmp_path)["updates"] == 2


def test_a_start_that_is_a_vit_alone(begun: dict[str, Path], tmp_path: Path) -> None:
    """Its weights stay, and a decoder begins anew; a head for classes goes."""
    path = checkpoint(tmp_path / "vit.safetensors")
    state = make_masked_model(recipe(model={"start": path})).state_dict()
    source = load_file(path)
    assert all(torch.equal(state[f"vit.{k}"], v) for k, v in source.items() if "head" not in k)
    assert "vit.head.weight" not in state
    decoder = rest(begun["mae"])["decoder.embed.weight"]
    assert not torch.equal(state["decoder.embed.weight"], decoder)
    assert state["decoder.embed.weight"].abs().max() <= (6 / 64) ** 0.5  # as Xavier draws


def test_a_start_without_a_name_is_what_it_is(begun: dict[str, Path]) -> None:
    """Its decoder comes along too."""
    model = make_masked_model(recipe(model={"start": str(begun["mae"])}))
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in rest(begun["mae"]).items())
    assert all(torch.equal(state[f"vit.{k}"], v) for k, v in exported(begun["mae"]).items())


@pytest.mark.parametrize("named", [True, False])
def test_a_start_of_another_method(
    named: bool, begun: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The ViT alone, and that is said."""
    start = {"start": str(begun["mae"])}
    model = make_masked_model(recipe(**{**SIMMIM, "model": {**MODEL, **start} if named else start}))
    assert "was pre-trained by mae: of that the ViT alone is taken" in caplog.text
    state = model.state_dict()
    assert all(torch.equal(state[f"vit.{k}"], v) for k, v in exported(begun["mae"]).items())
    assert "head.weight" in state and not any("decoder" in key for key in state)


def test_weights_that_do_not_fit(begun: dict[str, Path], tmp_path: Path) -> None:
    mae, simmim = begun["mae"], begun["simmim"]
    cases = (
        (
            ("options.decoder_depth=3",),
            {"model": {**MODEL, "start": str(mae)}},
            "lacks decoder.blocks.2.",
        ),
        (
            ("options.decoder_depth=1",),
            {"model": {**MODEL, "start": str(mae)}},
            "has no place for decoder.blocks.1.",
        ),
        (
            ("model.options.embed_dim=64",),
            {"model": {**MODEL, "start": str(mae)}},
            r"of shape \[.*, expected \[",
        ),
    )
    for overrides, parts, said in cases:
        with pytest.raises(ValueError, match=said):
            make_masked_model(recipe(*overrides, **parts))
    model = make_masked_model(config.read(Pretrain, simmim / "recipe.yaml"))
    path = tmp_path / "alone.safetensors"
    path.write_bytes((simmim / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"{rest_path(path)} does not exist; .* needs both"):
        load_weights(model, path)


# Killed and resumed ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrain, Path]:
    """All that draws and all that has a state, 2 epochs of 4 updates, in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    mine = recipe(
        *("loop.ema=0.8", "loop.accumulate=2", "loop.save_every=1", "data.batch=8"),
        *("optim.lr=3e-3", "optim.warmup_share=0.25", "optim.clip=1.0", "snapshots=1"),
        *("layers_every=1", "data.augment.crop=resized", "loop.pictures_every=1"),
        model={**MODEL, "drop_path": 0.2},
        mto={"ramp": 0.6},
        probe=PROBE,
    )
    assert elsewhere(mine, out) == 0
    return mine, out


@pytest.mark.parametrize(
    ("kill", "workers"),
    [
        pytest.param("1,5", 0, marks=pytest.mark.slow),
        pytest.param("0,3", 2, marks=pytest.mark.slow),
        pytest.param("end0", 1, marks=pytest.mark.slow),
        pytest.param("end1", 0, marks=pytest.mark.slow),
        ("val1", 0),
    ],
)
def test_killed_runs_go_on(
    kill: str, workers: int, undisturbed: tuple[Pretrain, Path], tmp_path: Path
) -> None:
    mine, whole = undisturbed
    mine = replace(mine, data=replace(mine.data, workers=workers))
    out = tmp_path / "run"
    assert elsewhere(mine, out, kill=kill) == -signal.SIGKILL
    assert not (out / "result.json").exists() and list((out / "checkpoints").iterdir())
    assert elsewhere(mine, out, resume=True) == 0
    assert same_run(whole, out) and same(rest(whole), rest(out))
    for folder in ("snapshots", "pictures"):
        names = [sorted(path.name for path in (root / folder).iterdir()) for root in (whole, out)]
        assert names[0] == names[1] and len(names[0]) in (2, 4)
    for name in names_of_snapshots(whole):
        assert same(load_file(whole / "snapshots" / name), load_file(out / "snapshots" / name))
    results = [json.loads((root / "result.json").read_text()) for root in (whole, out)]
    for key in ("loss", "loss_without_ema", "probe/knn", "probe/linear", "updates"):
        assert results[0][key] == results[1][key]
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "kill"),
    [
        ("bootmae", "1,2"),
        pytest.param("conmim", "1,2", marks=pytest.mark.slow),
        pytest.param("conmim", "end1", marks=pytest.mark.slow),
    ],
)
def test_teachers_go_on_where_they_were(name: str, kill: str, tmp_path: Path) -> None:
    """To the bit, statistics of batch norms too; views come from workers."""
    mine = recipe(
        *("loop.save_every=1", "data.augment.crop=resized", "optim.warmup_share=0.25"),
        *("data.workers=1", "loop.pictures_every=2", "layers_every=2"),
        **{**TAUGHT[name], "mto": {"ramp": 0.6}},
    )
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert elsewhere(mine, whole) == 0
    assert elsewhere(mine, out, kill=kill) == -signal.SIGKILL
    assert not (out / "result.json").exists()
    assert elsewhere(mine, out, resume=True) == 0
    assert same_run(whole, out) and same(rest(whole), rest(out))
    states = [
        torch.load(max((root / "checkpoints").iterdir()), weights_only=True)["state_dict"]
        for root in (whole, out)
    ]
    assert same(*states)
    teacher, student = (
        {
            key.removeprefix(start): value
            for key, value in states[0].items()
            if key.startswith(start)
        }
        for start in ("task.teacher.vit.", "task.model.vit.")
    )
    assert teacher.keys() == student.keys() and not same(teacher, student)
    kept = [load_file(root / "teacher.safetensors") for root in (whole, out)]
    assert same(*kept) and kept[0].keys() == exported(out).keys()
    key = "blocks.0.mlp.fc1.weight"
    assert torch.equal(kept[0][key], teacher[key])
    results = [json.loads((root / "result.json").read_text())["loss"] for root in (whole, out)]
    assert results[0] == results[1]


def names_of_snapshots(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "snapshots").iterdir())


def test_a_run_that_was_killed_before_its_result(tmp_path: Path) -> None:
    mine = recipe("loop.epochs=1", probe=PROBE)
    result = run(mine, tmp_path)
    log = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "result.json").unlink()
    again = run(mine, tmp_path, resume=True)
    for key in ("loss", "probe/knn", "probe/linear", "updates", "model"):
        assert again[key] == result[key]
    assert (tmp_path / "metrics.csv").read_text() == log


# Two processes -----------------------------------------------------------------------------------

# Momentum instead of Adam, whose first steps are signs and would hide a wrong scale. Of MTO the
# part that is a mean over images; the others are functions of such a mean.
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.05, "warmup_share": 0.25, "clip": 1.0}


@pytest.mark.slow  # the same engine as in tests/train/test_processes.py
def test_two_processes(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "mae": {"mto": {"e": 0, "r": 0, "spa": 1.0}, "snapshots": 1},
        "simmim": {**SIMMIM, "model": BEIT, "probe": PROBE, "layers_every": 1},
        **{name: {**changes, "snapshots": 1} for name, changes in TAUGHT.items()},
    }
    jobs, wanted = [], []
    for name, changes in parts.items():
        data = {**TREE["data"], "val_limit": 33, "val_batch": 8}
        mine = recipe("loop.epochs=1", "loop.ema=0.5", data=data, optim=SGD, **changes)
        with watched() as losses:
            wanted.append((name, losses, run(mine, tmp_path / f"{name}-one")))
        mine.data.batch //= 2
        (tmp_path / f"{name}.yaml").write_text(config.dump(mine))
        two = str(tmp_path / f"{name}-two")
        jobs.append(["pretrain", str(tmp_path / f"{name}.yaml"), "--out", two])
    assert together(jobs, tmp_path) == [0, 0]
    for number, (name, losses, result) in enumerate(wanted):
        one, two = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        both = torch.tensor([torch.load(tmp_path / f"losses-{number}-{r}.pt") for r in (0, 1)])
        assert both.shape[1] == len(losses) == 4 and not torch.equal(both[0], both[1])
        torch.testing.assert_close(both.mean(0), torch.tensor(losses), rtol=1e-4, atol=1e-5)
        mine, theirs = whole_state(one), whole_state(two)
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-5, msg=key)
        if name in TAUGHT:
            mine, theirs = (load_file(out / "teacher.safetensors") for out in (one, two))
            for key, value in mine.items():
                torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-5, msg=key)
        found = json.loads((two / "result.json").read_text())
        # Masks of evaluation are drawn batch by batch, and batches are other images here.
        assert found["loss"] == pytest.approx(result["loss"], rel=0.1)
        for key in ("updates", "model", "images"):
            assert found[key] == result[key]
        logs = [read_metrics(out / "metrics.csv") for out in (one, two)]
        assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
        if name == "simmim":
            assert found["probe/linear"] == pytest.approx(result["probe/linear"], abs=7)
            assert {"probe/knn", "heterogeneity/03"} <= {key for row in logs[1] for key in row}
        else:
            assert names_of_snapshots(one) == names_of_snapshots(two)


@pytest.mark.slow
def test_shared_out_students_and_their_teachers(tmp_path: Path) -> None:
    """With fsdp the teacher is whole on every process, and follows as on one."""
    jobs = []
    for name, changes in TAUGHT.items():
        mine = recipe("loop.epochs=1", optim=SGD, **changes)
        run(mine, tmp_path / f"{name}-one")
        mine.data.batch //= 2
        mine.loop.strategy = "fsdp"
        (tmp_path / f"{name}.yaml").write_text(config.dump(mine))
        two = str(tmp_path / f"{name}-two")
        jobs.append(["pretrain", str(tmp_path / f"{name}.yaml"), "--out", two])
    assert together(jobs, tmp_path) == [0, 0]
    for name in TAUGHT:
        for file in ("model.safetensors", "teacher.safetensors"):
            one, two = (load_file(tmp_path / f"{name}-{kind}" / file) for kind in ("one", "two"))
            assert one.keys() == two.keys()
            for key, value in one.items():
                torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)


# The command -------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if code else out


TINY = (
    *("data.limit=32", "data.val_limit=16", "data.batch=16", "data.val_batch=16"),
    *("loop.loggers=[]", "loop.log_every=1", "model.options.embed_dim=24"),
    *("model.options.depth=2", "probe.limit=64", "probe.val_limit=16", "probe.epochs=2"),
)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs/pretrain-fashion_part_mae"
    words = ("pretrain", "fashion_part_mae", *TINY, "mto.preset=default")
    said = command(capsys, *words, "loop.epochs=1")
    result = json.loads((out / "result.json").read_text())
    scores = [result[key] for key in ("loss", "probe/knn", "probe/linear")]
    wanted = "loss {:.4f}, nearest neighbours {:.2f} %, linear probe {:.2f} %; ".format(*scores)
    where = "the backbone is runs/pretrain-fashion_part_mae/model.safetensors"
    assert said.splitlines()[-1] == wanted + where
    assert "holds a run already: --resume" in command(capsys, *words, "loop.epochs=1", code=2)
    assert "the backbone is" in command(capsys, "pretrain", "--resume", str(out))
    said = command(capsys, "pretrain", "--resume", str(out), "optim.lr=1", code=2)
    assert (
        "a run goes on with its own recipe: foveate pretrain --resume FOLDER, and at most" in said
    )
    start = f"model.start={out}"
    tuned = ("finetune", "fashion_part_full", *TINY[:8], start, "loop.max_steps=2")
    assert "the model is" in command(capsys, *tuned)
    short = command(capsys, *words, "loop.max_steps=2", "--out", "short")
    assert "the backbone is short/model.safetensors" in short


def test_lists_and_printed_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = command(capsys, "pretrain", "--list").replace("\n", "")
    assert all(name in text for name in SHIPPED)
    printed = yaml.safe_load(
        command(capsys, "pretrain", "fashion_part_simmim", "mto.r=0", "--print")
    )
    assert printed["mto"]["r"] == 0 and printed["mto"]["similarity"] == "cosine"
    assert printed["method"] == "simmim"
    assert "name a recipe; foveate pretrain --list shows" in command(capsys, "pretrain", code=2)
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "all hidden": (("mask.ratio=1.0",), "mask.ratio must lie between 0 and 1, got 1.0"),
    "nothing hidden": (("mask.ratio=0",), "mask.ratio must lie between 0 and 1, got 0"),
    "nothing seen": (("mask.ratio=0.99",), "mask.ratio=0.99 hides 49 of 49 patches"),
    "units": (("mask.kind=unit",), "mask.unit=32 pixels must divide images of 28 x 28"),
    "kind": (("mask.kind=blocks",), "mask.kind"),
    "shallow": (
        ("options.decoder_depth=2", "mto.preset=default", "mto.layers=3"),
        "0 of a network of depth 2 is too few: lower mto.layers, or set mto.r=0",
    ),
    "size": (("model.options.img_size=30",), "images of 30 x 30 are not whole patches of 4 x 4"),
    "null": (("probe.every=null",), "probe.every needs a value, got null"),
    "preset": (("mto.preset=papr",), "mto.preset must be one of 'default', 'paper'; got 'papr'"),
    "weight": (("mto.spa=much",), "mto: spa: expected a number"),
    "frozen": (("optim.frozen_epochs=1",), "in pre-training all parameters learn together"),
    "scaled": (("optim.backbone_scale=0.1",), "in pre-training all parameters learn together"),
    "feature": (
        ("probe.feature=token", "model.options.class_token=false", "model.options.global_pool=''"),
        "probe.feature=token needs a class token",
    ),
    "heads": (
        ("options.decoder_heads=two",),
        "decoder_heads must be a whole number or None, got 'two'",
    ),
    "method": (("method=mea",), "'mea'; did you mean 'mae'?"),
    "option": (("options.decoder_dept=2",), "'decoder_dept'; did you mean 'decoder_depth'?"),
    "setting": (("mto.presett=paper",), "'mto.presett'; did you mean 'mto.preset'?"),
    "momentum": (
        ("method=conmim", "options={momentum: 1.0}"),
        "momentum must lie in [0, 1), got 1.0",
    ),
    "eval mode": (
        ("method=conmim", "options={}", "loop.eval_mode=true"),
        "loop.eval_mode=true keeps the batch norms of conmim from seeing the batch",
    ),
    "one hidden patch": (
        ("method=conmim", "options={}", "mask.ratio=0.01"),
        "conmim compares hidden patches of an image, and 1 is too few",
    ),
    "one block": (
        ("method=bootmae", "options={}", "model.options.depth=1"),
        "an encoder of 1 block has no two: make it deeper",
    ),
    "no blocks": (("mask.blocks=0.5",), "mask.blocks is for mask.kind=block, and the kind is ran"),
    "blocks": (("mask.blocks=0",), "mask.blocks must lie in (0, 1], got 0"),
    "mix": (("mix.mixup=0.2",), "the command line: unknown setting 'mix'"),
    "snapshots": (("snapshots=0",), "snapshots are epochs from 1 on, got 0"),
    "a snapshot": (("snapshots=[5,0]",), "snapshots are epochs from 1 on, got (5, 0)"),
    "layers": (("layers_every=0",), "layers_every are epochs from 1 on, got 0"),
    "probe": (("probe.every=0",), "probe.every must be at least 1, got 0"),
    "neighbours": (("probe.limit=8",), "neighbours=20 is more than the 8 images of"),
    "class token": (
        ("probe.feature=token", "model.options.class_token=false", "model.options.global_pool=''"),
        "feature=token needs a class token",
    ),
    "pooling": (("model.pool=avg",), "norms after pooling, and there is no pooling here"),
    "rotary": (
        ("model.name=eva02_tiny_patch14_224", "model.options={img_size: 28, in_chans: 1}"),
        "cannot be pre-trained here: timm's VisionTransformer and Beit can",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, and before there is a run."""
    settings, said = REFUSED[name]
    words = ("fashion_part_mae", *TINY, "loop.epochs=1", *settings)
    text = command(capsys, "pretrain", *words, "--out", str(tmp_path / "run"), code=2)
    assert said in text and text.count("\n") == 1


def test_folders_that_will_not_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, flat = tmp_path / "empty", tmp_path / "flat"
    for folder in (empty, flat):
        folder.mkdir()
    for number in range(4):
        Image.new("L", (28, 28), 60 * number).save(flat / f"{number}.png")
    out = ("--out", str(tmp_path / "run"))
    cases = {
        f"data.train=folder:{empty}": "no images",
        f"data.train=folder:{tmp_path / 'nowhere'}": "nowhere",
        f"probe.data=folder:{flat}": "labels come from a subfolder for each class",
        f"probe.data=folder:{empty}": "no images",
    }
    for setting, said in cases.items():
        text = command(
            capsys, "pretrain", "fashion_part_mae", *TINY, "loop.epochs=1", setting, *out, code=2
        )
        assert said in text and text.count("\n") == 1, text
    few = (f"data.train=folder:{flat}", "data.val=none", "data.limit=null")
    text = command(capsys, "pretrain", "fashion_part_mae", *TINY, *few, *out, code=2)
    assert "a batch of 16 is larger than the training data, which have 4 images" in text
