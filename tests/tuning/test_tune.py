"""``foveate.tune``: what is planted is found, and what is reported chose nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from small import built, images, logits, randomise, vit
from test_latency import OWN, REST, TOKEN, Clock, clock  # noqa: F401  (a fixture)

import foveate
from foveate import machine
from foveate.backbones import backbone_for
from foveate.bench import natural_images
from foveate.cli import main
from foveate.convert import open_base, save_plain
from foveate.core import Backbone
from foveate.core.cost import tokens_of
from foveate.data import Inputs, fashion_mnist_mini, normalise
from foveate.timing import Timings
from foveate.tuning import Tuned, result, run
from foveate.tuning.agreement import Judge, read_pictures
from foveate.tuning.candidates import Template, price_of, solve, templates
from foveate.tuning.search import Found, Scored

QUICK = {"count": 8, "tries": 4, "rounds": 0}


def late_is_harmless() -> torch.nn.Module:
    """A ViT whose class token has read all patches once two of four blocks are done."""
    model = randomise(vit()).eval()
    with torch.no_grad():
        for block in model.blocks[2:]:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


def at(found: Tuned, **keys: str) -> pd.Series:
    """The only row with these values."""
    rows = found.table
    for name, value in keys.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out two calls of git, and pictures but those of the search that all tests share."""
    monkeypatch.setattr(machine, "commit", lambda: None)
    monkeypatch.setattr(result, "save", lambda figure, *paths: [])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tune") / "out"
    return foveate.tune(
        late_is_harmless(), images(10), "70%", methods=["tome"], out=folder, **QUICK
    )


def test_the_planted_schedule_is_found(planted: Tuned) -> None:
    """Merging late costs nothing, merging everywhere does; both are as cheap."""
    chosen, constant = planted.row, at(planted, role="constant", method="tome")
    assert chosen["tokens"][0] == 37 and constant["tokens"][0] < 37
    assert chosen["choosing"] < 1e-6 and chosen["reporting"] < 1e-6
    assert constant["reporting"] > 1e-4
    assert chosen["same_reporting"] == 1.0
    assert planted.choice == chosen["options"]


def test_the_table_is_honest(planted: Tuned) -> None:
    halves = planted.about["images"]
    assert not set(halves["choosing"]) & set(halves["reporting"])
    assert len(halves["choosing"]) == len(halves["reporting"]) == 4
    at(planted, role="constant", method="random")
    dense = at(planted, role="dense")
    assert dense["macs"] == foveate.count(late_is_harmless()).macs and dense["reporting"] == 0
    others = planted.table[planted.table["role"] == "frontier"]
    assert len(others) and others["choosing"].isna().all() and others["reporting"].notna().all()
    # A faster one of the same agreement would be known.
    frontier = planted.table[planted.table["frontier"]]
    for row in frontier.itertuples():
        faster = planted.table[planted.table["predicted"] > row.predicted]
        assert (faster["reporting"] >= row.reporting).all()


def test_the_choice_opens_and_meets_the_target(planted: Tuned) -> None:
    opened = foveate.load(planted.path)
    assert repr(opened.reducer) == planted.choice
    counted = foveate.count(opened)
    assert counted.ratio <= 0.705 and counted.macs == planted.row["macs"]
    assert list(counted.tokens) == planted.row["tokens"]
    x = images(2)
    assert torch.equal(logits(opened, x), logits(planted.model, x))


def test_what_is_written(planted: Tuned) -> None:
    names = {path.name for path in planted.path.iterdir()}
    assert names >= {"tune.csv", "tune.json", "frontier.png", "frontier.svg", "foveate.json"}
    content = json.loads((planted.path / "tune.json").read_text(encoding="utf-8"))
    assert content["choice"] == planted.choice and len(content["table"]) == len(planted.table)
    table = pd.read_csv(planted.path / "tune.csv")
    assert list(table.columns) == list(planted.table.columns)
    assert table["tokens"].iloc[0] == "37 37 37 37"
    assert np.asarray(Image.open(planted.path / "frontier.png")).std() > 10
    said = "\n".join(planted.lines())
    assert f"foveate adapt {planted.path} --images FOLDER" in said
    assert f"model.start={planted.path}" in said and planted.choice in said


def test_a_seed_repeats(planted: Tuned, tmp_path: Path) -> None:
    model, x = late_is_harmless(), images(10)
    steps: list[str] = []
    again = foveate.tune(
        model,
        x,
        "70%",
        methods=["tome"],
        out=tmp_path / "again",
        progress=lambda what, done, of: steps.append(what),
        **QUICK,
    )
    assert steps[0] == "counting" and not [step for step in steps if "timing" in step]
    pd.testing.assert_frame_equal(again.table, planted.table)
    assert again.about["images"] == planted.about["images"]
    other = read_pictures(model, x, count=8, seed=1)
    assert [other.names[number] for number in other.choosing] != again.about["images"]["choosing"]


# A target in time --------------------------------------------------------------------------------


def test_a_time(clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    """The table knows the methods' own work, and what is measured is what was predicted."""
    options = {**QUICK, "rounds": 1, "tries": 1, "methods": ["evit"]}
    model, x = late_is_harmless(), images(4)
    steps: list[str] = []
    found = foveate.tune(
        model,
        x,
        "1.3x faster",
        out=tmp_path / "one",
        progress=lambda what, done, of: steps.append(what),
        **options,
    )
    assert steps[0] == "timing blocks"
    whole, row = REST + TOKEN * 37 * 4, found.row
    assert 0.97 * whole / 1.3 < row["predicted_ms"] < 1.003 * whole / 1.3  # counts are whole
    assert row["measured_ms"] == pytest.approx(whole / 1.3, rel=0.05)
    assert row["measured"] == pytest.approx(1.3, rel=0.05)
    spent = sum(row["tokens"]) * TOKEN + REST + OWN
    assert spent <= row["measured_ms"] * 1.01  # blocks attend before the method acts
    measured = clock.measured
    trial = (found.path / "README.md").read_text(encoding="utf-8")
    assert "| speed | not measured |" in trial
    options["rounds"] = 30
    again = foveate.tune(model, x, "1.3x faster", out=tmp_path / "two", **options)
    card = (again.path / "README.md").read_text(encoding="utf-8")
    times = f"| speed, batch 1 | {again.row['measured']:.2f} times as fast as without the method "
    assert times in card and "fp32; 30 interleaved rounds" in card
    assert clock.measured - measured < measured  # table and own work are kept
    assert again.choice == found.choice
    assert not [note for note in found.notes if "busy" in note]


def test_what_cannot_be_brought_to_a_time_is_not_the_choice(
    clock: Clock,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """EViT agrees best here, and is slower than any correction allows for: another one is taken."""
    real = run.beside_dense

    def slowed(backbone: Backbone, reducers: dict, *args: object, **options: object) -> Timings:
        found = real(backbone, reducers, *args, **options)
        slow = {name: 3 if name.startswith("evit") else 1 for name in found.samples}
        return Timings({n: [slow[n] * ms for ms in of] for n, of in found.samples.items()}, 1)

    monkeypatch.setattr(run, "beside_dense", slowed)
    options = {**QUICK, "rounds": 1, "tries": 1, "methods": ["evit"]}
    found = foveate.tune(late_is_harmless(), images(4), "1.3x faster", out=tmp_path, **options)
    assert found.choice.startswith("random") and found.row["measured"] > 1.3 * 0.95
    assert any("evit" in note and "could not be made to meet" in note for note in found.notes)
    assert "evit" in set(found.table["method"])
    # What was timed counts: in the frontier, in the picture, and in what might have been chosen.
    evit = found.table[found.table["method"] == "evit"]
    slow = evit[evit["measured"].notna()]
    assert (slow["predicted"] > 1.25).all() and (slow["measured"] < 1).all()
    assert found.row["frontier"] and not evit["frontier"].any()
    other = evit[(evit["role"] == "frontier") & evit["measured"].isna()]
    assert len(other) and (other["predicted"] < 1).all()  # with the own work that was timed
    lines = {str(line.get_label()): line for line in found.plot().axes[0].get_lines()}
    assert list(lines["choice"].get_xdata()) == [found.row["measured"]]
    assert max(lines["evit"].get_xdata()) < 1
    assert not [note for note in found.notes if "agrees better than the choice" in note]
    assert any("the choice is random, the control" in note for note in found.notes)


def test_a_choice_that_had_to_be_sped_up_is_compared_again(
    clock: Clock,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control agrees best at the predicted rate, and not at the one that meets the time."""
    real, slower = run.beside_dense, 1.0

    def slowed(backbone: Backbone, reducers: dict, *args: object, **options: object) -> Timings:
        found = real(backbone, reducers, *args, **options)
        slow = {name: slower if name.startswith("random") else 1.0 for name in found.samples}
        return Timings({n: [slow[n] * ms for ms in of] for n, of in found.samples.items()}, 1)

    monkeypatch.setattr(run, "beside_dense", slowed)
    torch.manual_seed(0)
    model, target = vit(), "1.3x faster"
    options = {**QUICK, "rounds": 1, "tries": 1, "methods": ["evit"], "judge": "features"}
    first = foveate.tune(model, images(4), target, out=tmp_path / "one", **options)
    assert first.choice.startswith("random")
    slower = 1.2
    found = foveate.tune(model, images(4), target, out=tmp_path / "two", **options)
    at_target = found.table[found.table["choosing"].notna() & (found.table["method"] != "dense")]
    quick = at_target[at_target["measured"] > 1.3 * 0.95]
    assert found.choice.startswith("evit") and found.row["choosing"] == quick["choosing"].min()
    assert "random" in set(quick["method"])  # it was brought to the time, and stays in the table
    assert any("random agreed best at the rate that was predicted" in note for note in found.notes)


def test_multiply_adds_are_not_mixed_with_times() -> None:
    """With a target in multiply-adds the frontier is of these, whatever was timed."""
    rows = pd.DataFrame({"predicted_ms": [np.nan], "predicted": [2.0], "measured": [1.5]})
    assert list(result.speeds(rows)) == [2.0]
    assert list(result.speeds(rows.assign(predicted_ms=3.0))) == [1.5]


def test_a_constant_rate_with_recall_is_in_the_table() -> None:
    backbone = backbone_for(late_is_harmless())
    (tome, control), _ = templates(backbone.spec, ["tome"], None, recalls=True)
    judge = Judge(backbone, read_pictures(backbone.model, images(4), 4, 0), "features")
    price = price_of("80%", backbone)

    def scored(template: Template, recall: int | None) -> Scored:
        made = solve(template, None, recall, price)
        assert made is not None
        return Scored.of(made, judge)

    constants = scored(tome, None), scored(control, None)
    best = constants[1], scored(tome, 3)
    table = run._Table(judge, price, backbone, lambda what, done, of: None)
    table.add(Found(constants, best, 3))
    at_target = [(role, one) for role, one in table.roles if role != "frontier"]
    assert at_target == [("choice", best[0]), ("schedule", best[1]), ("constant", constants[0])]


# Features ----------------------------------------------------------------------------------------


def test_merging_is_found_for_features(tmp_path: Path) -> None:
    """On a trained model, and nobody says so: merged patches keep features, dropped ones do not."""
    model = open_base("demo")
    model.reset_classifier(0)
    x = normalise(fashion_mnist_mini("test").images[:4])
    options = {**QUICK, "tries": 1, "methods": ["tome"]}
    found = foveate.tune(model, x, "60%", out=tmp_path / "out", **options)
    assert found.about["judge"] == "features" and found.row["method"] == "tome"
    merged = found.table[found.table["role"].isin(("choice", "constant"))]
    dropped = at(found, role="constant", method="random")
    assert merged["reporting"].min() < 0.5 * dropped["reporting"]
    assert found.row["reporting"] < 1 and np.isnan(found.row["same_reporting"])
    assert any("recall before" in words for words in found.table["schedule"])
    assert foveate.load(found.path).backbone.spec.classes == 0
    assert len(found.commands) == 1  # foveate reduce needs classes


# Methods with trained parts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["dynamicvit", "svit", pytest.param("cropr(r=3)", marks=pytest.mark.slow)]
)
def test_a_trained_method_is_searched_with_its_parts(method: str, tmp_path: Path) -> None:
    model = foveate.apply(vit(), method)
    randomise(model.reducer, seed=3)
    name = model.reducer.name
    found = foveate.tune(
        model, images(4), "75%", methods=[name], out=tmp_path / "out", **{**QUICK, "tries": 1}
    )
    one = at(found, role="constant", method=name) if found.row["method"] != name else found.row
    assert one["macs"] <= 0.755 * at(found, role="dense")["macs"]
    assert set(found.table["method"]) == {"dense", name, "random"}
    assert bool([note for note in found.notes if "gate='topk'" in note]) is (name == "svit")
    if found.row["method"] == name:
        chosen = found.model.reducer.state_dict()
        for key, value in model.reducer.state_dict().items():
            assert torch.equal(chosen[key], value)


def test_what_is_searched() -> None:
    """All that runs without training; what does not is left out, with the reason."""
    found, left_out = templates(backbone_for(vit()).spec, None, None, recalls=True)
    searched = {one.label: one.recalls for one in found}
    assert set(searched) | set(left_out) == set(foveate.list_methods())
    for name in ("cropr", "dynamicvit", "spvit", "static", "svit"):
        assert "must be trained first" in left_out[name]
    for name in ("ats", "atm"):
        assert "differs from image to image" in left_out[name]
    assert searched["tome"] == (None, 3, 2, 1) and searched["evovit"] == (None,)
    fixed, _ = templates(backbone_for(vit()).spec, ["tome(recall_before=2)"], None, recalls=True)
    assert [one.recalls for one in fixed] == [(2,), (None, 3, 2, 1)]  # random is always there


@pytest.mark.parametrize(
    "method", ["tome", "pitome", "evit", "attention", "random", "tokenmergence", "dynamicvit"]
)
def test_counts_are_met(method: str) -> None:
    """What is asked of a method's schedule is what its blocks leave."""
    reducer = built(method, depth=6, grid=(8, 8), qkv_cost=(1,) * 6, mlp_cost=(1,) * 6)
    left = [64, 50, 50, 31, 20, 20]
    spec = reducer.spec
    assert spec is not None
    options = reducer.at_counts(left)
    assert options is not None
    made = type(reducer)(**{**reducer.config(), **options})
    made.build(spec)
    counts = [block.output - spec.prefix for block in tokens_of(spec, made)]
    if method == "dynamicvit":  # its gates stay before blocks 1, 3 and 4
        assert made.active_blocks == reducer.active_blocks
        counts, left = ([row[b] for b in made.active_blocks] for row in (counts, left))
    fused = [counts[b] - left[b] for b in range(len(left))]
    assert all(extra in ((0, 1) if method == "evit" else (0,)) for extra in fused)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 3}, "count must be at least 4, half .* got 3"),
        ({"images": torch.zeros(3, 3, 48, 48)}, "at least 4 images are needed.*has 3"),
        ({"images": torch.zeros(8, 3, 40, 48)}, r"images must be \[N, 3, 48, 48\]"),
        ({"images": torch.zeros(8, 3, 48, 48).byte()}, "must be floats.*got torch.uint8"),
        ({"images": images(8) * float("nan")}, "image . of the tensor contains NaN or infinity"),
        ({"images": "nowhere"}, "nowhere does not exist"),
        ({"target": "5%"}, "no schedule meets the target '5%'.*the fastest one, "),
        ({"target": "100%"}, "the dense model meets the target '100%'"),
        ({"target": "soon"}, "budget must read like"),
        ({"methods": ["tomee"]}, "did you mean 'tome'"),
        ({"methods": ["dynamicvit"]}, "dynamicvit cannot be searched: learned parts"),
        ({"methods": ["ats"]}, "ats cannot be searched: the number of tokens differs"),
        ({"methods": ["tome(r=4)"]}, "the search sets r itself: leave it out of tome"),
        ({"methods": ["evit(keep=0.9) + tome(r=1)"]}, "a chain has no rate"),
        ({"judge": "looks"}, "judge must be one of 'classes', 'features'"),
        ({"tries": -1}, "tries must be a whole number from 0, got -1"),
        ({"model": "deit_tny_patch16_224"}, "did you mean deit_tiny_patch16_224"),
    ],
)
def test_refused(changed: dict, message: str, tmp_path: Path) -> None:
    model = vit() if "model" not in changed else changed["model"]
    given = {"images": images(8), "target": "70%", **QUICK, **changed, "out": tmp_path / "out"}
    given.pop("model", None)
    with pytest.raises(ValueError, match=message):
        foveate.tune(model, **given)
    assert not (tmp_path / "out").exists() or "target" in changed


def test_images_become_what_the_model_computes_with() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert read_pictures(vit().to(dtype), images(4), 4, 0).pixels.dtype == dtype
    assert read_pictures(vit().to("meta"), images(4), 4, 0).pixels.device.type == "meta"


def test_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        foveate.tune(vit(), tmp_path / "empty", "70%", out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="full exists and is not empty"):
        foveate.tune(vit(), images(4), "70%", out=tmp_path / "full")
    with pytest.raises(ValueError, match="a ViTMaskRCNN cannot be searched itself"):
        foveate.tune(open_base("demo_detector"), images(4), "70%", out=tmp_path / "out")


# The command -------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "my photos", tmp_path / "small.safetensors"
    folder.mkdir()
    save_plain(late_is_harmless(), model)
    for number, image in enumerate(fashion_mnist_mini("test").images[:6]):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    words = ["tune", str(model), "--images", str(folder), "--target", "70%", "--methods", "tome"]
    words += ["--tries", "2", "--rounds", "0", "--threads", "1", "--out", str(tmp_path / "my out")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    typed = [line[5:] for line in printed.splitlines() if line.startswith("next ")]
    one, other = (shlex.split(line, comments=True) for line in typed)
    assert one == ["foveate", "adapt", str(tmp_path / "my out"), "--images", str(folder)]
    assert (
        f"model.start={tmp_path / 'my out'}" in other and other[-1] == "data.train=folder:LABELLED"
    )
    assert "the control" not in printed  # ToMe beats it
    assert "Agreement with the dense model at 70%: 3 images choose, 3 report" in printed
    assert "choice   tome(r=" in printed and "random" in printed and "Frontier" in printed
    assert main(words) == 2
    assert "is not empty: name another folder (out, --out)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    made = natural_images(64, Inputs.of(model).size, 0)
    found = foveate.tune(model, made, "1.6x faster", out=tmp_path / "out")
    assert found.row["predicted"] > 1.59 and 1.3 < found.row["measured"] < 2.0
    assert len(found.about["images"]["reporting"]) == 32
    assert foveate.load(found.path).backbone.spec.width == 384
