"""foveate compare from end to end."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
from tiny import CELLS, METHOD, SHORT, Here, compare

from foveate.measure import Results, one, select


def _about(report: Path) -> dict:
    return json.loads((report / "report.json").read_text())


def _states(report: Path) -> dict[str, str]:
    return {name: state["kind"] for name, state in _about(report)["cells"].items()}


def _values(report: Path, metric: str, run: str, method: str = "", **keys: object) -> list[float]:
    """Numbers of a report, seed by seed."""
    table = Results.load(report / "report.json").table
    keys = {"part": "accuracy", **keys}
    return select(table, metric=metric, run=run, method=method, **keys)["value"].tolist()


def test_a_finished_comparison_runs_nothing(config: Path, out: Path, here: Here) -> None:
    files = [p for p in out.rglob("*") if p.parent != out and p.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert compare(config, "--out", out) == 0
    assert here.names == []
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.parent != out and p.is_file()}
    assert after == before
    assert _states(out) == dict.fromkeys(CELLS, "done")


def test_the_numbers_are_those_of_the_cells(finished: Path) -> None:
    out = finished
    cells = {}
    for folder in ("models/base", "models/masked", METHOD):
        for seed in (0, 1):
            path = out / folder / f"seed{seed}" / "eval.json"
            cells[folder, seed] = Results.load(path)

    def found(folder: str, metric: str, **keys: object) -> list[float]:
        return [one(cells[folder, seed].table, metric, **keys) for seed in (0, 1)]

    dense = found("models/masked", "top1", part="accuracy", method="")
    assert _values(out, "top1", "masked") == dense
    # Training looks at validation images, the comparison at those of the test.
    for seed in range(2):
        splits = json.loads((out / f"models/masked/seed{seed}/result.json").read_text())["splits"]
        assert splits["val"]["held_out_of"] == "fashion-mnist"
        settings = cells["models/masked", seed].about["settings"]
        assert (settings["data"], settings["split"]) == ("fashion-mnist", "test")
    name = "dynamicvit(keep=0.5)"
    reduced = found(METHOD, "top1", part="accuracy", method=name)
    assert _values(out, "top1", "masked", "dynamicvit") == reduced
    drops = [a - b for a, b in zip(dense, reduced, strict=True)]
    assert _values(out, "drop", "masked", "dynamicvit") == drops
    macs = _values(out, "macs", "masked", "dynamicvit")
    assert macs == found(METHOD, "macs", part="accuracy", method=name)
    whole = _values(out, "dense_macs", "masked", "dynamicvit")
    assert all(a < b for a, b in zip(macs, whole, strict=True))
    evit = found("models/masked", "top1", part="accuracy", method="evit(keep=0.5)")
    assert _values(out, "top1", "masked", "evit(keep=0.5)") == evit
    dropped = _values(out, "top1", "masked", part="occlusion", at=0.5, seed=0)
    own = select(cells["models/masked", 0].table, part="occlusion", metric="top1", at=0.5)
    assert dropped == own["value"].tolist() and len(dropped) == 2
    # In words: the mean over seeds of training of means over mask seeds.
    page = (out / "report.md").read_text()
    mean, std = statistics.fmean(dense), statistics.stdev(dense)
    assert f"| masked | dense | {mean:.2f} ± {std:.2f} (2) |" in page
    both = [_values(out, "top1", "masked", "random", part="pruning", seed=seed) for seed in (0, 1)]
    mean, std = (f(list(map(statistics.fmean, both))) for f in (statistics.fmean, statistics.stdev))
    masks = statistics.fmean(map(statistics.stdev, both))
    assert f"{mean:.1f} ± {std:.1f} (2) | {masks:.1f} |" in page


def test_the_report_has_its_files(finished: Path) -> None:
    out = finished
    page = (out / "report.md").read_text()
    for words in ("## Accuracy on 64 test images", "dropped at random", "- commit:", "(2) |"):
        assert words in page
    pictures = {path.name for path in out.glob("*.svg")}
    # The models were trained for one epoch, so there is no picture of how they converged.
    assert pictures == {"accuracy-macs.svg", "occlusion.svg", "pruning.svg"}
    assert all(f"]({name})" in page for name in pictures)
    top1 = select(Results.load(out / "report.json").table, metric="top1")
    # 4 of accuracy, 1 + 2 masks of occlusion, 2 + 1 of pruning; each for two seeds.
    assert len(top1) == 2 * (4 + 3 + 3) and set(top1["seed"]) == {0, 1}


def test_what_is_missing_is_shown_so(config: Path, out: Path) -> None:
    shutil.rmtree(out / METHOD / "seed1")
    (out / METHOD / "seed0" / "eval.json").unlink()
    (out / "models/masked/seed1/eval.json").unlink()
    assert compare(config, "--out", out, "--report") == 0
    # What training measured is of its validation images, and takes no test accuracy's place.
    assert _values(out, "top1", "masked", "dynamicvit") == []
    page = (out / "report.md").read_text()
    assert "| masked | dynamicvit-0.5 | missing |" in page and "(1 of 2)" in page
    assert "Cells that are not there: 4 of 12" in page and f"| {METHOD}/seed1 | to do |" in page


def test_a_dry_run_lists_and_does_nothing(
    config: Path, out: Path, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / METHOD / "seed1" / "result.json").unlink()
    assert compare(config, "--out", out, "--dry-run") == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:-1]] == CELLS
    assert f"{METHOD}/seed1       unfinished  update 2" in said
    assert f"after {METHOD}/seed1" in said
    assert said.splitlines()[-1] == "12 cells: 10 done, 1 unfinished, 1 to do"
    assert here.names == []
    assert compare(config, "--out", out, "--dry-run", "--only", "*/base/*") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 cells: 4 done"
    both = ("--only", "*/base/*", "--only", f"{METHOD}/seed0")
    assert compare(config, "--out", out, "--dry-run", *both) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 cells: 5 done"


def test_a_killed_cell_goes_on(config: Path, out: Path, here: Here) -> None:
    before = (out / METHOD / "seed1" / "result.json").read_text()
    (out / METHOD / "seed1" / "result.json").unlink()
    (out / METHOD / "seed0" / "result.json").unlink()
    shutil.rmtree(out / METHOD / "seed0" / "checkpoints")  # killed before there was one
    assert compare(config, "--out", out) == 0
    both = [f"{METHOD}/seed{seed}{end}" for seed in (0, 1) for end in ("", "/eval")]
    assert sorted(here.names) == both  # what was measured of the model before it is void
    after = json.loads((out / METHOD / "seed1" / "result.json").read_text())
    assert after["updates"] == json.loads(before)["updates"]


def test_another_question_is_measured_again(config: Path, out: Path, here: Here) -> None:
    assert compare(config, "evaluate.occlusion=[0.25]", "--out", out, "--only", "*seed0*") == 0
    assert here.names == ["models/masked/seed0/eval"]
    assert _states(out)["models/masked/seed1/eval"] == "to do"


def test_another_recipe_is_refused(
    config: Path, out: Path, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = f"settings={json.dumps([*SHORT, 'optim.lr=3e-3'])}"
    assert compare(config, changed, "--out", out) == 2
    said = capsys.readouterr().err
    assert "models/base/seed0: was trained with optim.lr=0.001, the recipe has 0.003" in said
    assert here.names == []
    assert compare(config, changed, "--out", out, "--report") == 0
    assert set(_states(out).values()) == {"differs", "to do"}
    assert _values(out, "top1", "base") == []


def test_a_failure_is_named_and_what_needs_it_skipped(
    config: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(out / "models" / "masked")
    shutil.rmtree(out / "reduced")
    broken = 'models.masked.settings=["distill.teacher=nowhere"]'
    assert compare(config, broken, "seeds=[0]", "--out", out) == 2  # a process of its own
    said = capsys.readouterr()
    lines = [line.split(",")[0].split(":")[0].split() for line in said.out.splitlines()]
    assert ["failed", "models/masked/seed0"] in lines
    for name in ("models/masked/seed0/eval", f"{METHOD}/seed0", f"{METHOD}/seed0/eval"):
        assert ["skipped", name] in lines
    assert "cells failed: 1, were skipped: 3; models/masked/seed0: " in said.err
    assert "nowhere" in said.err
    assert "nowhere" in (out / "models/masked/seed0/log.txt").read_text()
    assert len(_values(out, "top1", "base")) == 1


def test_opened_models_are_evaluated_and_started_from(
    config: Path, out: Path, tmp_path: Path, here: Here
) -> None:
    opened = tmp_path / "opened.yaml"
    opened.write_text(
        "seeds: [0]\n"
        "data: fashion-mnist\n"
        f"settings: {json.dumps(SHORT)}\n"
        "models:\n"
        f"  one: {{open: {out}/models/base/seed0}}\n"
        f"  each: {{open: '{out}/models/base/seed{{seed}}'}}\n"
        "methods:\n"
        "  evit: {recipe: fashion_part_dynamicvit, method: evit(keep=0.5), starts: [one]}\n"
        "evaluate: {limit: 32, statistics: false}\n"
    )
    assert compare(opened, "--out", tmp_path / "other") == 0
    names = [*("models/one/eval", "models/each/seed0/eval"), "reduced/one/evit/seed0"]
    assert here.names == [*names, "reduced/one/evit/seed0/eval"]
    other = tmp_path / "other"
    assert len(_values(other, "top1", "one", seed=None)) == 1
    assert len(_values(other, "drop", "one", "evit", seed=0)) == 1
