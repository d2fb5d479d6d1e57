"""The parts of a comparison: settings, numbers, the order of cells, Ray."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from threading import Lock

import pytest
from PIL import Image
from tiny import METHOD, Here, compare, write_config

from foveate import config as configs
from foveate.measure import Results, cell, launch, one, select
from foveate.measure.cells import Cell, make_cells
from foveate.measure.comparison import Comparison, Resources
from foveate.measure.gather import _logged
from foveate.measure.launch import FAILED, Outcome, command_of, run_cell, run_cells
from foveate.measure.rauc import rauc
from foveate.train.logs import read_metrics


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("models.masked.start=bas", "did you mean 'base'"),
        ("models.base.start=masked", "an earlier model"),
        ("models.base.recip=x", "did you mean 'recipe'"),
        ("models.base.open=x", "either recipe or open"),
        ("models.base.recipe=nothing", "unknown recipe for finetune 'nothing'"),
        ("models.a/b={recipe: x}", "names a folder"),
        ("methods.dynamicvit.method=dynamicvt(keep={rate})", "did you mean 'dynamicvit'"),
        ("methods.dynamicvit.rates=[2]", "keep"),
        ("methods.dynamicvit.method=dynamicvit", "has no {rate}"),
        ("methods.dynamicvit.starts=[masks]", "did you mean 'masked'"),
        ("evaluate.models=[all]", "unknown model in evaluate.models"),
        ("evaluate.pruning=[1.5]", "pruning"),
        ("evaluate.occlusion=[1.5]", "[0, 1]"),
        ("evaluate.device=gpu", "evaluate.device must be one of 'auto', 'cpu', 'cuda'"),
        ("evaluate.speed=[0]", "batches of speed must be at least 1"),
        ("models.masked.variants=[evti]", "did you mean 'evit'"),
        ("models.masked.like=bas", "did you mean 'base'"),
        ("models.masked.job=train", "job must be one of"),
        ("resources.processes=0", "processes must be at least 1"),
        ("seeds=[0, 0]", "seeds"),
        ("resources.cpus=-1", "at least 0"),
        ("evaluat.speed=true", "did you mean 'evaluate"),
        ("models.masked.settings=[data.val_limit=7]", "different images"),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    change: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [change]
    if change.endswith("=dynamicvit"):
        changes.append("methods.dynamicvit.rates=[0.5, 0.7]")
    assert compare(write_config(tmp_path), *changes, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parallel", "0"], "at least 1"),
        (["--address", "auto"], "--launcher ray"),
        (["--only", "nothing"], "selects no cell"),
        (["--only", "models/*", "--only", "nothing"], "--only nothing selects no cell"),
        (["evaluate.speed=[8]", "--parallel", "2"], "--parallel 1"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [word for word in options if "=" in word]
    rest = [word for word in options if "=" not in word]
    assert compare(write_config(tmp_path), *changes, "--out", tmp_path / "out", *rest) == 2
    assert words in capsys.readouterr().err


def test_the_comparison_that_ships_has_its_cells(tmp_path: Path) -> None:
    path = configs.find_recipe("compare", "fashion_part")
    cells = make_cells(configs.read(Comparison, path), tmp_path)
    names = [name for name in cells if not name.endswith("/eval")]
    assert len(names) == 9 + 12 and len(cells) == 2 * len(names)
    assert "reduced/masked/dynamicvit-0.7/seed1" in names
    recipe = cells["models/full/seed2"].work.settings
    assert recipe.masking.ratios == () and recipe.distill.kind == "none" and recipe.loop.seed == 2
    assert recipe.model.start == str(tmp_path.resolve() / "models/base/seed2")
    recipe = cells["reduced/full/dynamicvit-0.3/seed0"].work.settings
    assert recipe.method == "dynamicvit(keep=0.3)"


def test_cells_go_in_order_and_past_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = make_cells(configs.read(Comparison, write_config(tmp_path)), tmp_path / "out")
    lock, now, most, order = Lock(), [], [], []

    def run(one: Cell, *_: object) -> Outcome:
        with lock:
            now.append(one.name)
            most.append(len(now))
        time.sleep(0.01)
        with lock:
            now.remove(one.name)
            order.append(one.name)
        failed = one.name == "models/masked/seed1"
        return Outcome(one.name, FAILED if failed else "done")

    monkeypatch.setattr(launch, "run_cell", run)
    found = {o.name: o for o in run_cells(cells, list(cells), [], parallel=2)}
    assert found.keys() == cells.keys() and max(most) == 2
    for name in order:
        assert all(order.index(need) < order.index(name) for need in cells[name].needs)
    skipped = {name for name, outcome in found.items() if outcome.kind == "skipped"}
    assert skipped == {
        *("models/masked/seed1/eval", f"{METHOD}/seed1", f"{METHOD}/seed1/eval"),
    }
    assert found[f"{METHOD}/seed1/eval"].why == "models/masked/seed1 failed"
    # What --only leaves out is not there for others.
    (one,) = run_cells(cells, [f"{METHOD}/seed0"], [])
    assert (one.kind, one.why) == ("skipped", "models/masked/seed0 is not there")


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'foveate\[cluster\]'"):
        list(run_cells({}, [], [], resources=Resources()))


def as_a_command(*words: object) -> subprocess.CompletedProcess[str]:
    """Compare in a process of its own: Ray takes hold of the streams of the one it runs in."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "foveate", "compare", *map(str, words), "--launcher", "ray"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_an_address_where_nobody_is(config: Path, out: Path) -> None:
    words = ("evaluate.limit=8", "--out", out, "--address", "127.0.0.1:1")
    done = as_a_command(config, *words)
    assert done.returncode == 2
    assert "--address 127.0.0.1:1: no cluster of Ray answers" in done.stderr


@pytest.mark.slow  # half of a minute, most of it for Ray to begin and end
def test_cells_are_tasks_of_ray(config: Path, out: Path) -> None:
    path = out / METHOD / "seed0" / "eval.json"
    before = path.with_suffix(".csv").read_text()
    path.unlink()
    shutil.rmtree(out / METHOD / "seed1")
    done = as_a_command(config, "--out", out, "--parallel", "1", "--only", f"{METHOD}/*/eval")
    assert done.returncode == 2, done.stderr  # seed1 is not there to be evaluated
    assert f"skipped  {METHOD}/seed1/eval: {METHOD}/seed1 is not there" in done.stdout
    assert path.with_suffix(".csv").read_text() == before


def test_a_machine_that_does_not_see_the_folder(tmp_path: Path) -> None:
    cells = make_cells(configs.read(Comparison, write_config(tmp_path)), tmp_path / "out")
    found = run_cell(cells["models/base/seed0"], tmp_path)
    assert found.kind == FAILED and "cell.yaml is not there: the folder must be" in found.why


def test_a_cell_is_done_by_one_process_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    with cell.alone(tmp_path / "cell.yaml"):
        assert cell.main([str(tmp_path / "cell.yaml")]) == 2
    assert "another process is at work on" in capsys.readouterr().err


# Other jobs --------------------------------------------------------------------------------------

SMALL = "{img_size: 28, patch_size: 7, in_chans: 1, embed_dim: 32, depth: 2, num_heads: 2}"
PRETRAINING = f"""
seeds: [0, 1]
settings: [data.limit=32, data.val_limit=32, data.batch=16, "loop.loggers=[]",
  "model.options={SMALL}"]
models:
  mae:
    job: pretrain
    recipe: fashion_part_mae
    settings: [loop.epochs=2, probe.every=1, probe.limit=32, probe.val_limit=32, layers_every=1,
      "options={{decoder_width: 32, decoder_depth: 2, decoder_heads: 2}}", "snapshots=[]"]
  mae_mto: {{like: mae, settings: [mto.preset=default], seeds: [1]}}
  labels: {{recipe: fashion_part_full, settings: [loop.epochs=1, optim.warmup_epochs=0]}}
  labels_mae: {{like: labels, start: mae_mto, seeds: [1]}}
  labels_taught: {{like: labels_mae, teacher: labels, settings: [distill.kind=soft]}}
  conmim: {{job: pretrain, recipe: fashion_part_conmim, seeds: [1], settings: [loop.epochs=1,
    "probe.data=null", layers_every=null, "options={{projector_width: 32, projector_out: 16}}"]}}
  labels_teacher: {{like: labels_mae, start: conmim/teacher}}
  read:
    job: probe
    recipe: fashion_part
    start: mae
    seeds: [0]
    settings: [data.limit=32, data.val_limit=32, epochs=1, batch=16]
evaluate: {{together: true, statistics: false, batch: 64}}
"""


SPENT = ("before", "own", "in_all")


def test_any_job_is_a_cell(tmp_path: Path, here: Here) -> None:
    """Pre-training, probing, and fine-tuning from what was pre-trained, evaluated together."""
    path = tmp_path / "mine.yaml"
    path.write_text(PRETRAINING)
    out = tmp_path / "out"
    assert compare(path, "--out", out) == 0
    assert here.names == [
        *("models/mae/seed0", "models/mae/seed1", "models/mae_mto/seed1", "models/labels/seed0"),
        *("models/labels/seed1", "models/labels_mae/seed1", "models/labels_taught/seed1"),
        *("models/conmim/seed1", "models/labels_teacher/seed1"),
        *("models/read/seed0", "together/eval"),
    ]
    taught = configs.load(out / "models/labels_taught/seed1/recipe.yaml")
    assert taught["distill"]["teacher"] == str(out / "models/labels/seed1")
    assert taught["model"]["start"] == str(out / "models/mae_mto/seed1")
    teacher = configs.load(out / "models/labels_teacher/seed1/recipe.yaml")["model"]["start"]
    assert teacher == str(out / "models/conmim/seed1/teacher.safetensors")
    report = Results.load(out / "report.json", "foveate compare")
    table = report.table
    assert report.about["like"] == {"mae_mto": "mae"}
    for column in ("commit", "machine"):  # every number says where it comes from
        assert (table[column].fillna("") != "").all()
    curve = select(table, part="probe", metric="linear", run="mae", seed=1)
    logged = read_metrics(out / "models/mae/seed1/metrics.csv")
    scores = [float(line["probe/linear"]) for line in logged if line.get("probe/linear")]
    assert curve["at"].tolist() == [1, 2] and curve["value"].tolist() == scores
    layers = select(table, part="layers", metric="heterogeneity", run="mae_mto")
    assert layers["at"].tolist() == [0, 1, 2]  # of a decoder of two blocks
    read = json.loads((out / "models/read/seed0/result.json").read_text())
    assert one(table, "linear", part="probe", run="read") == read["linear"]
    # RAUC of the seed that both have, or the reason why there is none.
    found = select(table, part="rauc", method="probe/linear")
    if "rauc" in set(found["metric"]):
        other = select(table, part="probe", metric="linear", run="mae_mto")
        curves = [dict(zip(c["at"], c["value"], strict=True)) for c in (curve, other)]
        assert one(found, "rauc", seed=1) == pytest.approx(rauc(*curves))
        assert one(found, "mean_curves") == pytest.approx(one(found, "rauc"))  # of one seed
    else:
        note = "mae_mto over mae, probe/linear, seed 1: the base gains nothing"
        assert any(text.startswith(note) for text in report.about["notes"])
    took = select(table, part="training", metric="seconds", run="mae_mto", seed=1)
    assert took["at"].tolist() == [0, 1, 2] and 0 == took["value"].min() < took["value"].max()
    timed = []
    for run in ("mae", "mae_mto"):
        scores = select(table, part="probe", metric="linear", run=run, seed=1)["value"]
        at = select(table, part="training", metric="seconds", run=run, seed=1)["value"].iloc[1:]
        timed.append(dict(zip(at, scores, strict=True)))
    if "rauc_seconds" in set(found["metric"]):
        assert one(found, "rauc_seconds", seed=1) == pytest.approx(rauc(*timed))
    else:
        note = "mae_mto over mae, probe/linear, seed 1, by seconds: "
        assert any(text.startswith(note) for text in report.about["notes"])
    tuned = {"labels", "labels_mae", "labels_taught", "labels_teacher"}
    assert set(select(table, metric="top1")["run"]) == tuned
    page = (out / "report.md").read_text()
    for words in ("## Linear probe on frozen features", "## Heterogeneity of hidden tokens"):
        assert words in page
    pictures = ("probe", "probe-seconds", "knn", "knn-seconds", "layers", "minutes")
    assert {f"{name}.svg" for name in pictures} <= {path.name for path in out.glob("*.svg")}
    # What a model needed counts once: of labels_taught the pre-training and the teacher.
    chain = ("labels_taught", "mae_mto", "labels")
    took = [select(table, part="training", metric="seconds", run=run, seed=1) for run in chain]
    minutes = [part["value"].max() / 60 for part in took]
    times = {name: one(table, name, part="time", run="labels_taught", seed=1) for name in SPENT}
    wanted = (minutes[1] + minutes[2], minutes[0], sum(minutes))
    assert times == pytest.approx(dict(zip(SPENT, wanted, strict=True)))
    assert one(table, "before", part="time", run="labels", seed=1) == 0
    assert "## Minutes of training" in page
    here.names.clear()
    assert compare(path, "--out", out) == 0 and here.names == []
    moved = out.rename(tmp_path / "moved")  # the teacher lies at the same place among the cells
    assert compare(path, "--out", moved) == 0
    assert all(name.endswith("eval") for name in here.names)


def test_layers_of_two_networks_have_names_of_their_own(tmp_path: Path) -> None:
    """BootMAE logs those of both regressors."""
    log = tmp_path / "metrics.csv"
    names = ("heterogeneity/0/00", "heterogeneity/0/01", "heterogeneity/1/00", "cosine/1/visible")
    log.write_text(f"step,epoch,{','.join(names)}\n3,0,0.5,0.6,0.7,0.8\n9,1,0.1,0.2,0.3,0.4\n")
    found = {(row["metric"], row["at"]): row["value"] for row in _logged(log)}
    assert found == {
        **{("heterogeneity", 0.0): 0.1, ("heterogeneity", 1.0): 0.2},
        **{("heterogeneity_1", 0.0): 0.3, ("cosine_1", 0.0): 0.4},
    }


def test_the_comparisons_of_pretraining_ask_for_what_they_did(tmp_path: Path) -> None:
    path = configs.find_recipe("compare", "pretraining_part")
    comparison = configs.read(Comparison, path)
    cells = make_cells(comparison, tmp_path)
    jobs = Counter(cell.work.job for cell in cells.values())
    # MAE: 5 arms; SimMIM: 2 of three seeds and 3 of one; labels: 5 starts.
    assert jobs == {"pretrain": 5 * 3 + 2 * 3 + 3, "finetune": 5 * 3, "evaluate": 5 * 3}
    paper = cells["models/mae_mto_paper/seed2"].work.settings
    assert paper.mto.direction == "as_printed" and paper.loop.epochs == 16
    raw = cells["models/simmim_mto_raw/seed0"].work.settings
    assert (raw.method, raw.mto.similarity, raw.loop.seed) == ("simmim", "raw", 0)
    labels = cells["models/labels_mae_mto/seed1"]
    assert labels.work.settings.model.start == str(tmp_path.resolve() / "models/mae_mto/seed1")
    assert labels.needs == ("models/mae_mto/seed1",) and labels.work.settings.data.limit == 150
    assert comparison.root("mae_mto_raw") == "mae"


@pytest.mark.parametrize(
    "name", ["mergence_part", "mergence_cifar10", "yardstick_cifar10", "short_mae_cifar10"]
)
def test_the_other_comparisons_that_ship(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cells can be made, and methods of pre-training are compared with themselves."""
    monkeypatch.chdir(tmp_path)
    for split, kind in product(("train", "test"), "ab"):
        folder = tmp_path / "data/cifar10" / split / kind
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "1.png")
    comparison = configs.read(Comparison, configs.find_recipe("compare", name))
    cells = make_cells(comparison, tmp_path)
    jobs = Counter(cell.work.job for cell in cells.values())
    if name == "mergence_part":
        assert jobs == {"finetune": 3, "reduce": 3 * 3 + 7, "evaluate": 3 + 3 * 3 + 7}
        one = cells["models/multiscale_05/seed2"].work.settings
        assert (
            one.model.multiscale == {}
            and one.method == cells["models/mergence_05/seed2"].work.settings.method
        )
        assert "similarity" in str(cells["models/l2_05/seed0"].work.settings.method)
    elif name == "mergence_cifar10":
        assert jobs == {"finetune": 1, "reduce": 6, "evaluate": 7}
        dense, multiscale = (
            cells[f"models/{model}/seed0"].work.settings for model in ("dense", "multiscale_05")
        )
        assert multiscale.model.multiscale == {} and "tokenmergence" in str(multiscale.method)
        for part in ("data", "optim", "mix", "loop"):  # nothing but the method is another
            assert getattr(dense, part) == getattr(multiscale, part), part
    elif name == "short_mae_cifar10":
        assert jobs == {"pretrain": 5, "finetune": 4, "evaluate": 4}
        found = [cells[f"models/{model}/seed0"].work.settings for model in comparison.models]
        tried = {(one.mask.ratio, one.optim.lr) for one in found[:5]}
        assert tried == {*product((0.75, 0.85), (1.5e-3, 3e-3)), (0.9, 1.5e-3)}
        assert [one.optim.layer_decay for one in found[5:]] == [0.65, 0.75, 0.85, 1.0]
    else:
        assert jobs == {"pretrain": 9 * 3, "finetune": 13 * 3 + 2, "evaluate": 13 * 3 + 2}
        taught = cells["models/labels_taught/seed0"]
        assert taught.needs == ("models/mae/seed0", "models/labels_teacher/seed0")
        assert comparison.root("conmim_mto") == "conmim" and comparison.root("mae_short") == "mae"
        assert cells["models/bootmae_mto/seed0"].work.settings.loop.epochs == 4
        teacher = cells["models/labels_conmim_teacher/seed1"]
        start = tmp_path.resolve() / "models/conmim/seed1/teacher.safetensors"
        assert teacher.needs == ("models/conmim/seed1",)
        assert teacher.work.settings.model.start == str(start)


def test_the_study_of_decoder_depth(tmp_path: Path) -> None:
    """Each depth is compared with itself without masked token optimisation."""
    comparison = configs.read(Comparison, configs.find_recipe("compare", "mto_depth"))
    cells = make_cells(comparison, tmp_path)
    assert len(cells) == 4 * 2 * 3 and {cell.work.job for cell in cells.values()} == {"pretrain"}
    for depth in (1, 2, 4, 8):
        assert comparison.root(f"depth_{depth}_mto") == f"depth_{depth}"
        for name, mto in ((f"depth_{depth}", False), (f"depth_{depth}_mto", True)):
            found = cells[f"models/{name}/seed1"].work.settings
            assert found.options["decoder_depth"] == depth and (found.mto is not None) == mto
            assert (found.loop.epochs, found.data.batch, found.method) == (16, 64, "mae")


def test_several_processes_are_started_by_torchrun(tmp_path: Path) -> None:
    config = configs.read(Comparison, write_config(tmp_path), ["resources.processes=2"])
    cells = make_cells(config, tmp_path / "out")
    together = {name: cell.processes for name, cell in cells.items()}
    assert set(together.values()) == {1, 2}
    assert all(number == (1 if name.endswith("/eval") else 2) for name, number in together.items())
    words = command_of(cells["models/base/seed0"])
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert words[5:7] == ["-m", "foveate.measure.cell"]
    alone = command_of(cells["models/base/seed0/eval"])
    assert alone[1:3] == ["-m", "foveate.measure.cell"]
    log = tmp_path / "log.txt"
    log.write_text(
        "of an earlier start\nno space left\n"
        "E1126 14:13:27.603000 8123 torch/distributed/elastic/multiprocessing/api.py:1002] failed\n"
        "Traceback (most recent call last):\n=====\n"
    )
    assert launch._last_words(log, 20, 1) == "no space left (exit code 1)"


def test_what_an_earlier_version_trained_is_done(config: Path, out: Path, here: Here) -> None:
    """Run folders stay finished cells; what was measured in another form is measured again."""
    path = out / "models/base/seed0/eval.json"
    path.write_text('{"format": 1, "entries": [], "settings": {"asked": {}, "of": ""}}')
    assert compare(config, "--out", out) == 0
    assert here.names == ["models/base/seed0/eval"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("models.labels_mae.seeds=[0]", "needs mae_mto, which has no seed 0"),
        (
            "models.mae_mto.teacher=mae",
            "models/mae_mto/seed1: a model of job=pretrain has no teacher",
        ),
        ("models.labels_taught.teacher=label", "did you mean 'labels'"),
        ("models.mae.variants=[evit]", "has no classes: leave variants out"),
        ("models.mae_mto.like=maee", "did you mean 'mae'"),
        ("models.read.settings=[epoch=2]", "did you mean 'epochs'"),
        ("models.read.start=mae/teacher", "models/mae/seed0 keeps no teacher to start from"),
        ("models.read.start=maee/teacher", "did you mean 'mae'"),
        ("models.labels_mae.start=labels/teacher", "models/labels/seed1 keeps no teacher"),
    ],
)
def test_mistakes_about_other_jobs(
    change: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PRETRAINING)
    assert compare(path, change, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("scenes_segment", {"segment": 1 + 3 + 5 * 3}),
        ("scenes_detect", {"detect": 1 + 3 + 6 * 3 + 10}),
        ("scenes_transfer", {"pretrain": 3 + 3, "segment": 2 * 3 + 3, "detect": 2 * 3 + 3}),
    ],
)
def test_the_comparisons_on_scenes(name: str, jobs: dict[str, int], tmp_path: Path) -> None:
    comparison = configs.read(Comparison, configs.find_recipe("compare", name))
    cells = make_cells(comparison, tmp_path)
    trained = sum(number for job, number in jobs.items() if job != "pretrain")
    assert Counter(cell.work.job for cell in cells.values()) == {**jobs, "evaluate": trained}
    if name == "scenes_transfer":
        made = {label: cells[f"models/{label}/seed0"] for label in ("detect_scratch", "detect_mae")}
        assert made["detect_mae"].needs == ("models/mae/seed0",)
        assert made["detect_scratch"].needs == ()
        # They differ in the start alone.
        scratch, mae = (cell.work.settings for cell in made.values())
        assert scratch.model.start is None and mae.model.start.endswith("models/mae/seed0")
        assert replace(mae, model=replace(mae.model, start=None)) == scratch
