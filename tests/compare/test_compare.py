"""foveate compare from end to end."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from pathlib import Path

import pytest
from tiny import CELLS, METHOD, SHORT, Here, compare


def _states(report: Path) -> dict[str, str]:
    found = json.loads((report / "report.json").read_text())["cells"]
    return {name: state["kind"] for name, state in found.items()}


def _line(report: Path, model: str, method: str | None) -> dict:
    lines = json.loads((report / "report.json").read_text())["lines"]
    wanted = (model, method)
    (found,) = (x for x in lines if (x["subject"]["model"], x["subject"]["method"]) == wanted)
    return found


def test_a_finished_comparison_runs_nothing(config: Path, out: Path, here: Here) -> None:
    files = [p for p in out.rglob("*") if p.parent != out and p.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert compare(config, "--out", out) == 0
    assert here.names == []
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.parent != out and p.is_file()}
    assert after == before
    assert _states(out) == dict.fromkeys(CELLS, "done")


def test_the_numbers_are_those_of_the_cells(config: Path, out: Path) -> None:
    assert compare(config, "--out", out, "--report") == 0
    found = {}
    for folder in ("models/base", "models/masked", METHOD):
        for seed in (0, 1):
            path = out / folder / f"seed{seed}" / "eval.json"
            found[folder, seed] = json.loads(path.read_text())["entries"][0]

    def top1(folder: str, row: str) -> list[float]:
        return [found[folder, seed]["rows"][row]["accuracy"]["top1"] for seed in (0, 1)]

    def agree(number: dict, values: list[float]) -> None:
        assert number["values"] == {"0": values[0], "1": values[1]}
        assert number["mean"] == pytest.approx(statistics.fmean(values))
        assert number["std"] == pytest.approx(statistics.stdev(values))
        assert number["n"] == 2 and number["missing"] == []

    dense = top1("models/masked", "dense")
    agree(_line(out, "masked", None)["top1"], dense)
    # Training looks at validation images, the comparison at those of the test.
    for seed in range(2):
        folder = out / f"models/masked/seed{seed}"
        splits = json.loads((folder / "result.json").read_text())["splits"]
        assert splits["val"]["held_out_of"] == "fashion-mnist"
        settings = json.loads((folder / "eval.json").read_text())["settings"]
        assert (settings["data"], settings["split"]) == ("fashion-mnist", "test")
    trained = _line(out, "masked", "dynamicvit")
    (name,) = set(found[METHOD, 0]["rows"]) - {"dense"}
    reduced = top1(METHOD, name)
    agree(trained["top1"], reduced)
    agree(trained["drop"], [a - b for a, b in zip(dense, reduced, strict=True)])
    agree(trained["macs"], [found[METHOD, seed]["rows"][name]["macs"] for seed in (0, 1)])
    assert trained["macs"]["mean"] < trained["dense_macs"]["mean"]
    agree(_line(out, "masked", "evit(keep=0.5)")["top1"], top1("models/masked", "evit(keep=0.5)"))
    report = json.loads((out / "report.json").read_text())
    (curve,) = report["occlusion"]
    own = [found["models/masked", seed]["occlusion"]["top1"][1]["values"] for seed in (0, 1)]
    assert [len(values) for values in own] == [2, 2]
    agree(curve["top1"][1], [statistics.fmean(values) for values in own])
    random = next(one for one in report["pruning"] if one["method"] == "random")
    own = [found["models/masked", seed]["pruning"][0]["top1"]["values"] for seed in (0, 1)]
    agree(random["top1"], [statistics.fmean(values) for values in own])
    assert random["masks"]["mean"] == pytest.approx(statistics.fmean(map(statistics.stdev, own)))


def test_the_report_has_its_files(config: Path, out: Path) -> None:
    assert compare(config, "--out", out, "--report") == 0
    page = (out / "report.md").read_text()
    for words in ("## Base models", "## Methods", "dropped at random", "commit of cells", "(2) |"):
        assert words in page
    pictures = {path.name for path in out.glob("*.svg")}
    assert pictures == {
        *("accuracy-macs.svg", "occlusion.svg", "pruning.svg"),
        *("convergence-models.svg", "convergence-methods.svg"),
    }
    assert all(f"]({name})" in page for name in pictures)
    lines = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    # 4 lines of accuracy, 1 + 2 masks of occlusion, 2 + 1 of pruning; each for two seeds.
    assert len(lines) == 2 * (4 + 3 + 3)


def test_what_is_missing_is_shown_so(config: Path, out: Path) -> None:
    shutil.rmtree(out / METHOD / "seed1")
    (out / METHOD / "seed0" / "eval.json").unlink()
    assert compare(config, "--out", out, "--report") == 0
    line = _line(out, "masked", "dynamicvit")
    # What training measured is of its validation images, and takes no test accuracy's place.
    assert line["top1"]["values"] == {} and line["top1"]["missing"] == [0, 1]
    assert line["drop"]["n"] == 0 and line["macs"]["mean"] is None
    page = (out / "report.md").read_text()
    assert "| missing |" in page
    assert "Cells that are not there: 3 of 12" in page and f"| {METHOD}/seed1 | to do |" in page


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
    assert "models/base/seed0: was trained with optim.lr=0.001, the comparison has 0.003" in said
    assert here.names == []
    assert compare(config, changed, "--out", out, "--report") == 0
    assert set(_states(out).values()) == {"differs", "to do"}
    assert _line(out, "base", None)["top1"]["n"] == 0


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
    assert _line(out, "base", None)["top1"]["n"] == 1


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
    line = _line(tmp_path / "other", "one", None)
    assert list(line["top1"]["values"]) == ["all"] and line["top1"]["n"] == 1
    assert _line(tmp_path / "other", "one", "evit")["drop"]["n"] == 1
