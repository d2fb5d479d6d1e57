"""foveate pipeline: run whole, skipped, gone on with, and refused."""

from __future__ import annotations

import importlib
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from train.runs import _plant, ended, start

import foveate
from foveate import cli, config
from foveate.measure import Results, one, select
from foveate.measure.cell import judge, train
from foveate.stages import Pipeline
from foveate.stages.plan import plan, planned
from foveate.train.module import Module

OPTIONS = {
    **{"img_size": 28, "patch_size": 7, "in_chans": 1},
    **{"embed_dim": 32, "depth": 2, "num_heads": 2},
}
MODEL = {"name": "vit_tiny_patch16_224", "options": OPTIONS}
TREE: dict[str, Any] = {
    "data": {"train": "fashion-mnist", "batch": 16, "val_batch": 64, "limit": 32, "val_limit": 32},
    "loop": {"epochs": 1, "log_every": 1, "save_every": 1, "loggers": []},
    "stages": {
        "pretrain": {
            "model": MODEL,
            "options": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
            "data": {"mean": [0.286], "std": [0.353]},
        },
        "probe": {"epochs": 2, "batch": 16, "neighbours": 3},
        "finetune": {"loop": {"epochs": 2}},
        "masked": {
            "job": "finetune",
            "model": {"start": "pretrain"},
            "masking": {"ratios": [0, 0.5], "stratified": True},
            "distill": {"kind": "soft", "teacher": "finetune"},
        },
        "reduce": {"method": "dynamicvit(keep=0.7)"},
    },
    "evaluate": {
        **{"rates": [0.5], "occlusion": [0.5], "mask_seeds": 1, "limit": 32},
        **{"speed": [4], "rounds": 2},
    },
}
STAGES = ["1-pretrain", "2-probe", "3-finetune", "4-masked", "5-reduce"]
TRAINED = [name for name in STAGES if name != "2-probe"]
JUDGED = ["3-finetune", "4-masked", "5-reduce"]


def pipeline(*words: object) -> int:
    """The command, as a terminal would start it."""
    return cli.main(["pipeline", *map(str, words)])


def write_recipe(folder: Path, tree: Mapping[str, Any] = TREE) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    return path


def exported(run: Path) -> dict[str, Tensor]:
    """The weights that a run exported."""
    name = "model/foveate.safetensors" if (run / "model").is_dir() else "model.safetensors"
    return load_file(run / name)


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, to the bit, and logged the same."""
    a, b = exported(one), exported(other)
    logs = [(run / "metrics.csv").read_text() for run in (one, other)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and logs[0] == logs[1]


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    assert pipeline(write_recipe(folder), "--out", folder / "out") == 0
    return folder


@pytest.fixture
def recipe(_finished: Path) -> Path:
    return _finished / "tiny.yaml"


@pytest.fixture
def out(_finished: Path, tmp_path: Path) -> Path:
    """A copy, somewhere else than where it was made."""
    return Path(shutil.copytree(_finished / "out", tmp_path / "out"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are run from now on, and "evaluation"."""
    found: list[str] = []
    room = importlib.import_module("foveate.stages.run")

    def noted(work: Any, folder: Path, **options: Any) -> None:
        found.append(folder.name)
        train(work, folder, **options)

    def judged(work: Any, folder: Path, *more: Any) -> Any:
        found.append(folder.name)
        return judge(work, folder, *more)

    monkeypatch.setattr(room, "train", noted)
    monkeypatch.setattr(room, "judge", judged)
    return found


def test_each_stage_is_a_run_that_starts_from_the_one_before(out: Path) -> None:
    for name in STAGES:
        assert (out / name / "result.json").is_file()
    recipes = {name: config.load(out / name / "recipe.yaml") for name in STAGES}
    starts = {name: Path(one["model"]["start"] or "scratch").name for name, one in recipes.items()}
    assert starts == {
        **{"1-pretrain": "scratch", "2-probe": "1-pretrain", "3-finetune": "1-pretrain"},
        **{"4-masked": "1-pretrain", "5-reduce": "4-masked"},
    }
    assert Path(recipes["4-masked"]["distill"]["teacher"]).name == "3-finetune"
    # Said once for all, and by a stage for itself.
    assert all(one["data"]["limit"] == 32 for one in recipes.values())
    assert [recipes[name]["loop"]["epochs"] for name in TRAINED] == [1, 2, 1, 1]


def test_the_report_says_what_each_stage_brought(out: Path) -> None:
    table = Results.load(out / "report.json").table
    assert list(dict.fromkeys(select(table, metric="top1", part="accuracy")["run"])) == JUDGED
    dense = {name: one(table, "top1", part="accuracy", run=name, method="") for name in JUDGED}
    own = {"part": "accuracy", "run": "5-reduce", "method": "dynamicvit(keep=0.7)"}
    top1, macs = one(table, "top1", **own), one(table, "macs", **own)
    reduced = select(table, part="accuracy", metric="macs", run="5-reduce")
    assert reduced["rate"].dropna().tolist() == [0.7, 0.5]
    assert macs < one(table, "dense_macs", **own)
    assert set(select(table, part="speed", metric="times")["run"]) == set(JUDGED)
    assert one(table, "linear", part="probe", run="2-probe") <= 100
    page = (out / "report.md").read_text()
    assert "| 5-reduce | reduce, dynamicvit(keep=0.7) | 4-masked | 2 |" in page
    assert f"{top1 - dense['4-masked']:+.2f} points over 4-masked" in page
    assert f"{dense['4-masked']:.2f} | " in page and "over the linear probe of 1-pretrain" in page
    assert f"{macs / one(table, 'dense_macs', **own):.0%} of the multiply-adds" in page
    for name in ("accuracy-macs.svg", "accuracy-speed.svg", "occlusion.svg"):
        assert (out / name).is_file() and f"]({name})" in page


def test_a_finished_pipeline_runs_nothing(
    recipe: Path, out: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(recipe, "--out", out) == 0
    assert trained == []
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("skipped")] == [
        f"{name}:" for name in STAGES
    ]
    assert "stages   1-pretrain: pretrain (done)" in said and "next     foveate show" in said


@pytest.mark.slow
def test_it_goes_on_between_stages(recipe: Path, out: Path, trained: list[str]) -> None:
    for name in ("4-masked", "5-reduce", "evaluation"):
        (out / name).rename(out.parent / name)
    assert pipeline(recipe, "--out", out) == 0
    assert trained == ["4-masked", "5-reduce", "evaluation"]
    assert all(same_run(out / name, out.parent / name) for name in ("4-masked", "5-reduce"))


@pytest.mark.slow
def test_it_goes_on_inside_a_stage(
    recipe: Path,
    tmp_path: Path,
    _finished: Path,
    trained: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "cut"
    original = Module._watch
    error: BaseException = ValueError("stopped by the test")

    def stops(self: Module, *arguments: Any) -> None:
        if self.trainer.global_step == 3:  # the fine-tuning alone has more than two updates
            raise error
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "_watch", stops)
        assert pipeline(recipe, "--out", out) == 2
        assert "3-finetune: stopped by the test" in capsys.readouterr().err
        first, error = list(trained), KeyboardInterrupt()
        assert pipeline(recipe, "--out", out) == 130
    assert "stopped; the same command goes on from the last checkpoint" in caplog.text
    assert "--resume" not in caplog.text
    assert not (out / "3-finetune" / "result.json").exists() and not (out / "report.md").exists()
    assert first == ["1-pretrain", "2-probe", "3-finetune"]
    trained.clear()
    assert pipeline(recipe, "--out", out) == 0
    assert trained == ["3-finetune", "4-masked", "5-reduce", "evaluation"]
    assert "3-finetune, 3 of 5, going on from update 3" in capsys.readouterr().out
    assert all(same_run(out / name, _finished / "out" / name) for name in TRAINED)


def _dies(recipe: Path, out: Path) -> None:
    """The command in a process that kills itself in the second epoch: the fine-tuning has one."""
    _plant("1,0")
    pipeline(recipe, "--out", out)


@pytest.mark.slow
def test_it_goes_on_after_it_was_killed(
    recipe: Path, tmp_path: Path, _finished: Path, trained: list[str]
) -> None:
    out = tmp_path / "killed"
    assert ended(start(_dies, recipe, out)) == -signal.SIGKILL
    assert not (out / "3-finetune" / "result.json").exists()
    assert pipeline(recipe, "--out", out) == 0
    assert trained == ["3-finetune", "4-masked", "5-reduce", "evaluation"]
    assert all(same_run(out / name, _finished / "out" / name) for name in TRAINED)


@pytest.mark.slow
def test_the_small_one_that_ships_runs_to_its_end(tmp_path: Path) -> None:
    """About four minutes on two cores."""
    assert pipeline("fashion_part", "--out", tmp_path) == 0
    table = Results.load(tmp_path / "report.json").table
    assert set(select(table, part="accuracy")["run"]) == set(JUDGED)
    for name in ("3-finetune", "4-masked"):
        assert one(table, "top1", part="accuracy", run=name, method="") > 60
    assert one(table, "linear", part="probe", run="2-probe") > 60


def test_another_recipe_is_refused(
    recipe: Path, out: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(recipe, "stages.masked.optim.lr=3e-3", "--out", out) == 2
    said = capsys.readouterr().err
    assert "4-masked: was trained with optim.lr=0.001, the recipe has 0.003" in said
    shutil.rmtree(out / "1-pretrain")
    assert pipeline(recipe, "--out", out) == 2
    assert "2-probe was trained from 1-pretrain, which is not finished" in capsys.readouterr().err
    assert trained == []


def test_another_question_is_measured_again(recipe: Path, out: Path, trained: list[str]) -> None:
    assert pipeline(recipe, "evaluate.rates=[0.9]", "evaluate.speed=[]", "--out", out) == 0
    assert trained == ["evaluation"]
    table = Results.load(out / "report.json").table
    found = select(table, part="accuracy", metric="macs", run="5-reduce")
    assert found["rate"].dropna().tolist() == [0.7, 0.9] and not len(select(table, part="speed"))


def test_the_function_does_the_same(out: Path, trained: list[str]) -> None:
    said: list[str] = []
    results = foveate.pipeline(
        data=TREE["data"],
        stages=TREE["stages"],
        loop=TREE["loop"],
        evaluate=TREE["evaluate"],
        out=out,
        progress=False,
        say=said.append,
    )
    assert trained == [] and said[-1] == f"wrote    {out / 'report.md'}"
    assert len(select(results.table, metric="top1", part="accuracy")) == 5  # two of them at a rate
    with pytest.raises(ValueError, match="takes images by their spec"):
        foveate.pipeline(data=torch.utils.data.TensorDataset(torch.zeros(1)))  # type: ignore[arg-type]


# Before the first step ----------------------------------------------------------------------------

SECOND = "stages.more={job: pretrain, method: conmim, model: {start: pretrain}"  # and more


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.pretrain.job=pretrian", "stages.pretrain: unknown job 'pretrian'; did you mean"),
        ("stages.second={}", "stages.second must say its job"),
        ("stages.a/b={job: finetune}", "a stage names a folder"),
        ("stages.finetune=3", "stages.finetune must hold keys and values"),
        ("stages.finetune.recipe={loop: {epochs: 1}}", "recipe must be a name or a file"),
        ("stages.finetune.recipe=nothing", "stages.finetune: unknown recipe for finetune"),
        ("stages.finetune.optm.lr=1", "stages.finetune: unknown setting 'optm'"),
        ("stages={}", "at least one stage"),
        ("data.trian=x", "unknown setting 'trian'; did you mean 'train'"),
        ("loop.epoch=3", "did you mean 'epochs'"),
        ("evaluate.rate=[0.5]", "did you mean 'evaluate.rates'"),
        ("evaluate.speed=[0]", "batches of speed must be at least 1"),
        ("evaluate.device=gpu", "evaluate.device must be one of"),
        ("evaluate.occlusion=[1.5]", "[0, 1]"),
        ("evaluate.rates=[2]", "stages.reduce: evaluate.rates: dynamicvit at rate 2"),
        ("stages.reduce.method=null", "stages.reduce names no method"),
        ("stages.reduce.method=dynamicvt", "did you mean 'dynamicvit'"),
        ("stages.reduce.method=dynamicvit(blocks=(9,))", "stages.reduce: "),
        (
            "stages.reduce.method=dynamicvit(keep=0.5); stages.reduce.budget=2x faster",
            "stages.reduce: give keep or a budget, not both",
        ),
        (
            "stages.reduce.method=dynamicvit; stages.reduce.budget=fast",
            "stages.reduce: budget must read like",
        ),
        (
            "stages.reduce.method=dynamicvit; stages.reduce.budget=0.5x faster",
            "stages.reduce: a budget must be more than 1x faster",
        ),
        ("stages.reduce.method=ats; stages.reduce.budget=9 ms", "stages.reduce: the time of ats"),
        ("stages.reduce.method=svit(keep=0.7)", "stages.reduce: evaluate.rates: the gates of"),
        ("stages.masked.model.start=fintune", "did you mean 'finetune'"),
        ("stages.masked.model.start=reduce", "earlier stage or a file that exists"),
        ("stages.masked.model.start=probe", "cannot start from probe, which trains no model"),
        ("stages.masked.distill.teacher=pretrain", "pretrain cannot teach, it is a pretrain stage"),
        ("stages.masked.distill.teacher=null", "pretrain has no classes and cannot teach masked"),
        ("stages.masked.distill.teacher=nowhere", "distill.teacher must name an earlier stage"),
        ("stages.reduce.model.start=pretrain", "pretrain has no classes and cannot teach reduce"),
        ("stages.more={job: pretrain}", "would lose its classes: say model.start=reduce"),
        ("stages.more={job: finetune}", "stages.more is a finetune stage after reduce"),
        ("stages.more={job: reduce, method: tome}", "would lose its method"),
        ("stages.finetune.data.train=folder:x", "the same labelled images in all stages"),
        ("stages.masked.data.val_share=0.3", "data.val_share=0.3 and stages.probe 0.1"),
        ("stages.masked.data.val=none", "data.val=none is for pre-training alone"),
        (
            "stages.pretrain.data.val=none",
            "stages.pretrain has data.val=none and stages.probe None",
        ),
        ("stages.pretrain.data.val_share=0.05", "it would be trained on some that are held out"),
        ("stages.pretrain.data.split_seed=1", "has data.split_seed=1 and stages.probe 0"),
        ("data.train=folder:nowhere", "nowhere"),
        ("data.train=folder:unlabelled", "unlabelled holds 1 image and no subfolders: labels come"),
        ("stages.masked.data={mean: [0.5], std: [0.5]}", "data.mean=[0.5]"),
        ("stages.masked.model.name=vit_nothing", "must be a model that timm knows"),
        ("stages.masked.model.name=vit_tiny_patch16_224", "width 192 and the model of pretrain 32"),
        # What the run of a stage itself would refuse, after the stages before it.
        ("stages.masked.model.multiscale={}", "stages.masked: multi-scale ViT models take no kee"),
        (
            "stages.masked={job: finetune, model: {multiscale: {early: 1}}}; "
            "stages.reduce.method=dynamicvit(keep=0.7,blocks=(1,))",
            "stages.reduce: blocks must lie in 0..0",
        ),
        ("stages.reduce.teacher=demo", "teacher has patches (7, 7), the student (4, 4)"),
        ("stages.masked.distill.teacher=demo", "teacher has patches (7, 7), the student (4, 4)"),
        ("stages.finetune={mix: {mixup: 0.8}, data: {batch: 15}}", "must be even, got 15"),
        ("stages.finetune.optim.fixed=[nothere]", "optim.fixed names nothere"),
        ("stages.reduce.optim.name=adamm", "not an optimiser of timm"),
        ("stages.finetune.loop.devices=9999", "stages.finetune: loop.devices=9999 is more than"),
        ("stages.reduce.weights.klx=1", "stages.reduce: unknown loss of dynamicvit 'klx'"),
        (
            "stages.masked.model.options={qkv_bias: false}; stages.masked.model.name=lvvit_s",
            "stages.masked: model.name=lvvit_s: ",
        ),
        ("evaluate.workers=-1", "workers must be at least 0"),
        (
            "stages.pretrain.model.options.class_token=false; "
            "stages.pretrain.model.options.global_pool=''; stages.probe.feature=token",
            "stages.probe: feature=token needs a class token",
        ),
        # Pre-training that is not the first stage.
        (f"{SECOND}, options: {{momentum: 1.0}}}}", "stages.more: momentum must lie in [0, 1)"),
        (f"{SECOND}, mask: {{kind: unit, unit: 10}}}}", "stages.more: mask.unit=10"),
        (f"{SECOND}, mask: {{unit: 7}}, probe: {{data: folder:nowhere}}}}", "nowhere"),
        ("stages.more={job: pretrain, method: conmi, model: {start: pretrain}}", "mean 'conmim'"),
        ("stages.masked.model.start=pretrain/teacher", "stages.pretrain keeps no teacher to start"),
        ("stages.masked.model.start=finetune/teacher", "stages.finetune keeps no teacher to start"),
    ],
)
def test_what_contradicts_itself_is_said_before_the_first_step(
    change: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unlabelled").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "unlabelled" / "1.png")
    changes = change.split("; ")
    assert pipeline(write_recipe(tmp_path), *changes, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_probe_may_read_random_weights() -> None:
    probe = {**TREE["stages"]["probe"], "model": {**MODEL, "start": None}}
    stages = {**TREE["stages"], "probe": probe}
    found, _ = plan(config.parse(Pipeline, {**TREE, "stages": stages}), Path("nowhere"))
    assert found[1].start is None and found[1].recipe.model.start is None


@pytest.mark.parametrize("budget", ["1.5x faster", "12 ms, batch 8", "79%"])
def test_a_stage_may_have_a_budget(budget: str) -> None:
    """It is read before the first step, and a time is found once the stage has its weights."""
    stages = {**TREE["stages"], "reduce": {"method": "dynamicvit", "budget": budget}}
    found, _ = plan(config.parse(Pipeline, {**TREE, "stages": stages}), Path("nowhere"))
    assert found[-1].recipe.budget == budget


def test_a_stage_may_start_from_the_teacher_of_pretraining() -> None:
    pretrain = {**TREE["stages"]["pretrain"], "method": "bootmae"}
    masked = {**TREE["stages"]["masked"], "model": {"start": "pretrain/teacher"}}
    stages = {**TREE["stages"], "pretrain": pretrain, "masked": masked}
    found, _ = plan(config.parse(Pipeline, {**TREE, "stages": stages}), Path("nowhere"))
    assert found[3].start is found[0]
    assert Path(found[3].recipe.model.start) == found[0].cell.folder / "teacher.safetensors"


def test_the_progress_curve_follows_the_images() -> None:
    """A recipe that reads its own images reads those that it is given; any other stays."""
    curves = (
        ({"recipe": "fashion_part_mae"}, "folder:photos"),
        ({"recipe": "fashion_part_mae", "probe": {"data": "fashion-mnist"}}, "fashion-mnist"),
        ({"recipe": "cifar10_mae"}, "folder:photos"),
        (TREE["stages"]["pretrain"], None),
    )
    for stage, wanted in curves:
        tree = {"data": {"train": "folder:photos"}, "stages": {"pretrain": stage, "finetune": {}}}
        made = config.parse(Pipeline, tree)
        assert planned(made, made.in_order[0], [], Path("out")).recipe.probe.data == wanted


def test_pretraining_may_see_what_no_other_stage_is_judged_by(tmp_path: Path) -> None:
    labelled: dict[str, Any] = {"batch": 1}
    for name in ("train", "val", "test"):
        (tmp_path / name / "a").mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / name / "a" / "1.png")
        labelled[name] = f"folder:{tmp_path / name}"
    other = {"train": f"folder:{tmp_path / 'more'}", "val": "none", "val_share": 0.5}
    for given, seen in ((labelled, labelled["train"]), (TREE["data"], other["train"])):
        pretrain = {**TREE["stages"]["pretrain"], "data": {**other, "train": seen}}
        tree = {**TREE, "data": {**given}, "stages": {**TREE["stages"], "pretrain": pretrain}}
        plan(config.parse(Pipeline, tree), tmp_path / "out")
    for name in ("val", "test"):
        pretrain = {**TREE["stages"]["pretrain"], "data": {**other, "train": labelled[name]}}
        tree = {**TREE, "data": labelled, "stages": {**TREE["stages"], "pretrain": pretrain}}
        with pytest.raises(ValueError, match=f"trains on .*, which is data.{name} of stages.p"):
            plan(config.parse(Pipeline, tree), tmp_path / "out")


def _with_model(**options: Any) -> dict[str, Any]:
    return {"model": {**MODEL, "options": {**OPTIONS, **options}}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 56}, "grid (8, 8) and the model of pretrain (4, 4)"),
        ({"patch_size": 14}, "patch (14, 14) and the model of pretrain (7, 7)"),
        ({"in_chans": 3}, "channels 3 and the model of pretrain 1"),
        ({"depth": 3}, "depth 3 and the model of pretrain 2"),
    ],
)
def test_models_of_other_sizes_are_refused(options: dict[str, Any], words: str) -> None:
    stages = {**TREE["stages"], "finetune": _with_model(**options)}
    with pytest.raises(ValueError, match="stages.finetune: ") as error:
        plan(config.parse(Pipeline, {**TREE, "stages": stages}), Path("nowhere"))
    assert words in str(error.value)


def test_pretraining_alone_and_after_classes_is_refused() -> None:
    pretrain, finetune = TREE["stages"]["pretrain"], TREE["stages"]["finetune"]
    with pytest.raises(ValueError, match="nothing to evaluate"):
        config.parse(Pipeline, {**TREE, "stages": {"pretrain": pretrain}})
    stages = {"finetune": {**finetune, "model": MODEL}, "pretrain": pretrain}
    made = config.parse(Pipeline, {**TREE, "stages": stages})
    with pytest.raises(ValueError, match="would lose its classes: say model.start=finetune"):
        plan(made, Path("nowhere"))
    stages["pretrain"] = {**pretrain, "model": {**MODEL, "start": "finetune"}}
    made = config.parse(Pipeline, {**TREE, "stages": stages})
    with pytest.raises(ValueError, match="evaluate.rates are for methods, and no stage is a red"):
        plan(made, Path("nowhere"))
    made.evaluate.rates = ()
    found, _ = plan(made, Path("nowhere"))
    assert found[1].start is found[0]


def test_a_batch_that_a_later_stage_cannot_fill_is_refused() -> None:
    stages = {**TREE["stages"], "reduce": {**TREE["stages"]["reduce"], "data": {"batch": 33}}}
    with pytest.raises(ValueError, match=r"stages.reduce: a batch of 33 is larger .* have 32 im"):
        plan(config.parse(Pipeline, {**TREE, "stages": stages}), Path("nowhere"))


def test_a_first_stage_without_a_start_is_refused() -> None:
    stages = {"finetune": {"model": {"start": "runs/nowhere"}}}
    with pytest.raises(ValueError, match=r"stages\.finetune: model\.start must name .*'runs/nowh"):
        plan(config.parse(Pipeline, {**TREE, "stages": stages}), Path("nowhere"))
    stages = {"finetune": {"recipe": "fashion_part_masked"}}
    with pytest.raises(ValueError, match="runs/finetune-fashion_part_full does not exist"):
        plan(config.parse(Pipeline, {"stages": stages}), Path("nowhere"))


# What ships ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", config.list_recipes("pipeline"))
def test_a_recipe_that_ships_fits_together(name: str) -> None:
    path = config.find_recipe("pipeline", name)
    made = config.read(Pipeline, path, ["data.train=fashion-mnist"])
    assert f"foveate pipeline {name}" in path.read_text()
    assert config.parse(Pipeline, yaml.safe_load(config.dump(made))) == made
    found, evaluation = plan(made, Path("nowhere"))
    assert [one.stage.name for one in found] == list(made.stages)
    assert list(evaluation.work.models) == [one.stage.label for one in found[2:]]


def test_the_recipe_of_the_documentation_fits_together() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text()
    tree = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    found, evaluation = plan(config.parse(Pipeline, tree), Path("nowhere"))
    starts = [one.start.stage.name if one.start else None for one in found]
    assert starts == [None, "pretrain", "pretrain", "pretrain", "masked"]
    assert evaluation.work.asked["split"] == "test"


def test_help_lists_the_settings_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipeline("--help")
    said = capsys.readouterr().out
    for words in ("stages (needed)", "evaluate.rates=[]", "evaluate.speed=[64]", "--list"):
        assert words in said
    assert pipeline("--list") == 0
    said = capsys.readouterr().out
    assert "fashion_part" in said and "imagenet_mae_b" in said
    assert pipeline("fashion_part", "--print") == 0
    probe = {"recipe": "fashion_part", "feature": "avg", "lr": 10.0}
    assert yaml.safe_load(capsys.readouterr().out)["stages"]["probe"] == probe
    assert pipeline() == 2 and "name a recipe" in capsys.readouterr().err
