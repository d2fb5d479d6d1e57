"""A look at runs: what is chosen, the numbers, the pictures, the command, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import config, machine
from foveate.cli import main
from foveate.data import eval_transform, open_images
from foveate.measure import Results, one, select
from foveate.measure import look as looking
from foveate.measure.kept import choose, read_recipe, weights_kept
from foveate.measure.look import Choices, Look, alarms, look
from foveate.measure.style import evenly
from foveate.mim.heterogeneity import Similarity, heterogeneity, visible_cosine
from foveate.mim.layers import ALARM, affinity
from foveate.mim.method import fixed_mask
from foveate.mim.models import make_masked_model
from foveate.mim.recipe import Pretrain
from foveate.mim.run import pretrain
from foveate.mim.weights import load_weights
from foveate.train.logs import read_metrics

TREE: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "options": {
            **{"img_size": 28, "patch_size": 7, "in_chans": 1},
            **{"embed_dim": 32, "depth": 3, "num_heads": 2},
        },
    },
    "data": {
        **{"train": "fashion-mnist", "mean": [0.286], "std": [0.353]},
        **{"batch": 16, "limit": 64, "val_limit": 32},
    },
    "loop": {"epochs": 2, "log_every": 1, "loggers": []},
    "snapshots": 1,
    "layers_every": 1,
}
MAE = {"method": "mae", "options": {"decoder_width": 32, "decoder_depth": 2}}
SIMMIM = {"method": "simmim", "mask": {"kind": "random"}}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of 8 updates each."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:  # the autouse fixtures come later
        patch.setattr(machine, "commit", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for name, tree in (("mae", MAE), ("simmim", SIMMIM)):
            pretrain(config.parse(Pretrain, {**TREE, **tree}), folder / name, progress=False)
    return {name: folder / name for name in ("mae", "simmim")}


@pytest.fixture
def mae(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run that may be damaged."""
    return Path(shutil.copytree(runs["mae"], tmp_path / "mae"))


def command(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["look", *words]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if code else out


def levels(found: Look, point: int, what: str = "mean", run: int = 0) -> list[float]:
    name, about = list(found.about["runs"].items())[run]
    keys = {"run": name, "method": list(about["epochs"])[point], "draw": 0, "part": "layers"}
    return select(found.table, metric=what, **keys)["value"].tolist()


def losses(found: Look, metric: str = "loss") -> list[float]:
    return select(found.table, part="loss", metric=metric)["value"].tolist()


# The numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_the_numbers_are_those_of_a_direct_computation(runs: dict[str, Path], name: str) -> None:
    run, kind = runs[name], Similarity("scaled")
    report = look([run], Choices(similarity=kind, images=10, seed=3, image=2, layers=(0, 1)))
    recipe = config.read(Pretrain, run / "recipe.yaml")
    model = make_masked_model(recipe).eval()
    source = open_images("fashion-mnist", "val", labels=False)
    transform = eval_transform((28, 28), 1)
    places = [i * len(source) // 10 for i in range(10)]
    pixels = np.stack([transform(source.sample(place))["image"] for place in places])
    images = (torch.from_numpy(pixels).float() / 255 - 0.286) / 0.353
    mask = fixed_mask(model, images, recipe.mask.filled(model.hiding), 3)
    files = (run / "snapshots/epoch-0001.safetensors", run / "model.safetensors")
    weights = dict(zip(("epoch 1", "epoch 2"), map(str, files), strict=True))
    assert report.about["runs"][name]["weights"] == weights
    for number, file in enumerate(files):
        load_weights(model, file)
        with torch.no_grad():
            found = model(images, mask, states=True)
        (network,) = found.states
        tokens = [network.initial, *network.tokens[1:]]
        each = torch.stack([heterogeneity(x, mask, kind) for x in tokens])
        cosines = torch.stack([visible_cosine(x, mask) for x in tokens])
        got = report
        assert levels(got, number) == pytest.approx(each.mean(1).tolist(), abs=1e-6)
        assert levels(got, number, "std") == pytest.approx(each.std(1).tolist(), abs=1e-6)
        assert levels(got, number, "cosine") == pytest.approx(cosines.mean(1).tolist(), abs=1e-6)
        assert losses(got)[number] == pytest.approx(float(found.losses["pixel"]), rel=1e-5)
        maps = report.maps[name, f"epoch {number + 1}", 0]
        assert list(maps) == [0, 1]
        assert np.allclose(maps[1], affinity(tokens[1], mask, kind)[2], atol=1e-6)


def test_they_are_what_the_run_logged(runs: dict[str, Path]) -> None:
    found = look([runs["mae"]])
    logged = read_metrics(runs["mae"] / "metrics.csv")
    names = [f"heterogeneity/{layer:02d}" for layer in range(3)]
    last = [line for line in logged if line.get(names[0])][-1]
    assert levels(found, -1) == pytest.approx([float(last[name]) for name in names], abs=1e-6)
    wanted = [float(line["val/loss"]) for line in logged if line.get("val/loss")]
    assert losses(found, "val_loss") == pytest.approx(wanted)


def test_images_are_measured_in_pieces(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = Choices(images=20, image=13)
    whole = look([runs["simmim"]], choices)
    monkeypatch.setattr(looking, "_CHUNK", 8)
    pieces = look([runs["simmim"]], choices)
    for what in ("mean", "std", "cosine"):
        one, other = (levels(found, 0, what) for found in (whole, pieces))
        assert one == pytest.approx(other, abs=1e-6)
    assert losses(whole) == pytest.approx(losses(pieces), rel=1e-5)
    one, other = (found.maps["simmim", "epoch 1", 0][3] for found in (whole, pieces))
    assert np.allclose(one, other, atol=1e-6)


def test_untrained_weights_are_those_that_the_run_began_with(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    found = look([runs["mae"]], Choices(untrained=True, epochs=(2,), images=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(found.about["runs"]["mae"]["epochs"].values()) == [0, 2]
    recipe = config.read(Pretrain, runs["mae"] / "recipe.yaml", ["optim.lr=1e-12", "loop.epochs=1"])
    pretrain(recipe, tmp_path / "idle", progress=False)
    idle = look([tmp_path / "idle"], Choices(images=8))
    assert levels(found, 0) == pytest.approx(levels(idle, 0), abs=1e-5)


def test_one_image_has_no_spread(runs: dict[str, Path]) -> None:
    found = look([runs["mae"]], Choices(images=1))
    assert len(levels(found, 0)) == 3 and "std" not in set(found.table["metric"])


# What is looked at -------------------------------------------------------------------------------


def test_evenly() -> None:
    assert evenly(range(9), 4) == [0, 3, 5, 8]
    assert evenly(range(3), 4) == [0, 1, 2] and evenly(range(3), 1) == [2]


def test_which_epochs(mae: Path) -> None:
    for epoch in range(3, 10):  # of a run that went on for longer
        for kind in (".safetensors", ".pretrain.safetensors"):
            path = mae / "snapshots" / f"epoch-{epoch:04d}{kind}"
            shutil.copy(mae / "snapshots" / f"epoch-0001{kind}", path)
    (mae / "result.json").write_text(json.dumps({"epochs": 10.0}))

    def epochs(chosen: tuple[float, ...] | None) -> list[float | None]:
        kept = weights_kept(mae, read_recipe(mae))
        return [epoch for epoch, _ in choose(mae, kept, chosen).values()]

    assert epochs(()) == [1, 3, 4, 6, 7, 9, 10]
    assert epochs(None) == [1, *range(2, 11)]
    assert epochs((9, 2)) == [2, 9]
    about = look([mae], Choices(epochs=(9, 2), images=2)).about
    assert list(about["runs"]["mae"]["epochs"].values()) == [2, 9]
    (mae / "model.safetensors").unlink()  # still going on
    assert epochs((1,)) == [1]
    with pytest.raises(ValueError, match=r"no weights after epoch 10; those after epochs 1, 2, 3"):
        epochs((10,))


def test_files_of_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    snapshot = runs["mae"] / "snapshots" / "epoch-0001.pretrain.safetensors"
    report = look([runs["mae"] / "model.safetensors", snapshot], Choices(images=2))
    runs_ = report.about["runs"]
    assert list(runs_) == ["mae"] and list(runs_["mae"]["epochs"]) == ["epoch 1", "epoch 2"]
    alone = Path(shutil.copy(snapshot, tmp_path / "some.safetensors"))
    with pytest.raises(ValueError, match=r"some.safetensors has no recipe.yaml in the folders"):
        look([alone])


def test_files_without_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    """As convert --pretraining writes them: measured like the run's own, on images one names."""
    for kind in (".safetensors", ".pretrain.safetensors"):
        shutil.copy(runs["mae"] / f"model{kind}", tmp_path / f"released{kind}")
    file = tmp_path / "released.safetensors"
    with pytest.raises(ValueError, match="has no recipe that names images: name them with --data"):
        look([file])
    choices = Choices(images=3, data="fashion-mnist")
    found = look([file, runs["mae"]], choices)
    alone, _ = found.about["runs"].values()
    assert alone["method"] == "mae" and list(alone["epochs"]) == ["released"]
    first, *_, last = losses(found)
    assert first == last
    assert levels(found, -1) == levels(found, -1, run=1)
    arguments = ["look", str(file), "--data", "fashion-mnist", "--images", "2"]
    assert main(arguments) == 0
    assert (tmp_path / "look-released" / "look.json").is_file()


def test_the_start_is_not_opened(mae: Path, runs: dict[str, Path]) -> None:
    recipe = mae / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("start: null", "start: gone.pth"))
    assert "gone.pth" in recipe.read_text()
    assert levels(look([mae]), -1) == levels(look([runs["mae"]]), -1)
    tree = config.dump(config.read(Pretrain, recipe))
    nameless = tree.replace("name: vit_tiny_patch16_224", "name: null")
    begin, end = nameless.index("  options: {img_size"), nameless.index("  start:")
    recipe.write_text(nameless[:begin] + nameless[end:])
    assert config.read(Pretrain, recipe).model.name is None
    assert levels(look([mae]), -1) == levels(look([runs["mae"]]), -1)


def test_other_images_some_of_them_broken(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(0)
    for number in range(6):
        pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    run = look([runs["simmim"]], Choices(data=f"folder:{tmp_path}")).about["runs"]["simmim"]
    assert run["images"] == 5 and run["data"] == f"folder:{tmp_path} (all)"
    assert "2.png" in caplog.text
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="has no readable image to look at: .*0.png"):
        look([runs["simmim"]], Choices(data=f"folder:{tmp_path}"))


def test_alarms(runs: dict[str, Path]) -> None:
    report = look([runs["mae"]], Choices(images=4, epochs=(2,)))
    table = report.table
    for cosine, wanted in ((0.949, 0), (0.96, 1)):
        table.loc[(table["metric"] == "cosine") & (table["at"] == 0), "value"] = cosine
        found = [text.startswith("alarm: mae, epoch 2: ") for text in alarms(report)]
        assert found == [True] * wanted and wanted == (cosine > ALARM)


# Refusals ----------------------------------------------------------------------------------------


def test_runs_that_cannot_be_looked_at(mae: Path, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "none", "does not exist; expected the folder of a pre-training run"),
        (tmp_path, "is not the folder of a run: it has no recipe.yaml"),
        (mae / "recipe.yaml", "is neither the folder of a run nor a .safetensors file"),
    ):
        with pytest.raises(ValueError, match=said):
            look([path])
    (mae / "model.pretrain.safetensors").unlink()
    with pytest.raises(ValueError, match="model.pretrain.safetensors does not exist"):
        look([mae])
    (mae / "model.safetensors").unlink()
    assert list(look([mae]).about["runs"]["mae"]["epochs"]) == ["epoch 1", "epoch 2"]
    shutil.rmtree(mae / "snapshots")
    with pytest.raises(ValueError, match="holds no weights yet: the run has not ended"):
        look([mae])
    (mae / "recipe.yaml").write_text("model: {name: vit_tiny_patch16_224}\nmasking: {}\n")
    with pytest.raises(ValueError, match="holds no pre-training that can be read: .*masking"):
        look([mae])
    with pytest.raises(ValueError, match="no run was given"):
        look([])


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"image": 4, "images": 4}, r"image must lie in 0\.\.3, got 4"),
        ({"layers": (0, 3)}, r"layers of mae must lie in 0\.\.2, got 3"),
        ({"data": "fashion"}, "fashion-mnist"),
    ],
)
def test_choices_that_do_not_fit(runs: dict[str, Path], choices: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        look([runs["mae"]], Choices(**choices))


def test_choices_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        Choices(images=0)
    with pytest.raises(ValueError, match=r"layers are numbers from 0 on, got \[-1\]"):
        Choices(layers=(-1,))


# The command -------------------------------------------------------------------------------------


def test_the_command(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(runs["mae"]), str(runs["simmim"]), "--untrained", "--similarity", "raw"]
    out = command(capsys, *words, "--images", "12", "--out", str(tmp_path / "out"))
    found = Results.load(tmp_path / "out" / "look.json", "foveate look")
    assert (found.about["similarity"], found.about["temperature"]) == ("raw", None)
    assert "heterogeneity by layer, raw dot products" in out
    for number, name in enumerate(("mae", "simmim")):
        about = found.about["runs"][name]
        assert (about["method"], about["images"]) == (name, 12)
        means = select(found.table, part="layers", metric="mean", run=name, method="epoch 2")
        assert means["at"].tolist() == list(range((3, 4)[number]))
        line = next(line for line in out.splitlines() if line.split()[:3] == [name, "epoch", "2"])
        assert [f"{mean:.3f}" for mean in means["value"]] == line.split()[3:-2]
        assert f"{one(found.table, 'loss', run=name, method='epoch 2'):.4f}" == line.split()[-2]
    names = ("heterogeneity", "affinity", "reconstructions-mae", "reconstructions-simmim")
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("L"))
        assert pixels.std() > 10, f"{name} is blank"
    assert "<svg" in (tmp_path / "out" / "heterogeneity.svg").read_text()[:1000]
    assert not list((tmp_path / "out").glob("*.partial"))


def test_the_folder_is_the_first_runs(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, str(mae), "--epochs", "all", "--images", "3", "--layers", "0", "2")
    assert {path.name for path in (mae / "look").iterdir()} == {
        *("look.json", "look.csv", "heterogeneity.svg", "heterogeneity.png"),
        *("affinity.png", "reconstructions.png"),
    }
    assert f"wrote    {mae / 'look' / 'look.json'}" in out


def test_the_command_refuses(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs["mae"])
    for words, said in (
        ([run, "--epochs", "7"], "has kept no weights after epoch 7; those after epochs 1, 2"),
        ([run, "--epochs", "last"], "--epochs takes numbers, or all; got last"),
        ([run, "--temperature", "0"], "temperature must be above 0, got 0.0"),
    ):
        err = command(capsys, *words, code=2)
        assert err.count("\n") == 1 and said in err
