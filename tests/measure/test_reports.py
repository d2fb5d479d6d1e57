"""The table, its files, and what is made of it: sheets, pages, pictures."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
from batches import demo_batches
from text import text_of

from foveate.data.demo import demo_vit
from foveate.machine import facts
from foveate.measure import (
    Evaluation,
    Results,
    costs,
    frame,
    occlusion,
    one,
    over_seeds,
    pruning,
    select,
    speeds,
    token_statistics,
    variants,
    write,
)
from foveate.measure.accuracy import drops
from foveate.measure.curves import columns, curve
from foveate.measure.figures import figures, lines_figure, tradeoff_figure
from foveate.measure.sheets import markdown, sheets
from foveate.measure.table import rows, said


@pytest.fixture(scope="module")
def report() -> Evaluation:
    """Two models with the same numbers; speed is invented."""
    model, batches = demo_vit(), demo_batches(12, 6)
    found = variants(model, ["ats(K=20)", "static"], [0.5, 0.7])
    statistics = token_statistics(found["ats(K=20)"], batches)
    parts = [
        costs(found, batches),
        occlusion(model, batches, ratios=[0, 0.5, 1], seeds=2),
        pruning(model, batches, rates=[0.5], seeds=2),
        statistics.table(),
    ]
    for number, (method, rate) in enumerate(
        [("", None), ("ats(K=20)", 20), ("static(keep=0.5)", 0.5), ("static(keep=0.7)", 0.7)]
    ):
        ratio = {"times": 1.5 if number else 1.0, "low": 0.9, "high": 1.6, "spread": 0.1}
        ratio |= {"per_second": 100.0 + number, "rounds": 30}
        parts.append(frame(rows("speed", ratio, method=method, rate=rate, at=64)))
        if "static" in method:
            parts.append(frame(rows("accuracy", {"untrained": 1}, method=method, rate=rate)))
    whole = pd.concat(parts, ignore_index=True)
    both = [frame(whole, run=run) for run in ("demo", "oth|er")]
    table = frame(pd.concat(both, ignore_index=True), commit="abc", machine="one core")
    table = pd.concat([table, drops(table)], ignore_index=True)
    about = {
        "command": "foveate eval demo",
        "machine": facts("cpu"),
        "settings": {"data": "fashion-mnist", "split": "test", "mask_seeds": [0, 1]},
        "models": {run: {"family": "timm", "unreadable": 0} for run in ("demo", "oth|er")},
    }
    return Evaluation(table, about, {("demo", "ats(K=20)"): statistics})


def of_one(report: Evaluation) -> Results:
    return Results(select(report.table, run="demo"), report.about)


# The table ---------------------------------------------------------------------------------------


def test_files_parse_back(report: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "new" / "eval.json"
    assert report.save(path) == [path, path.with_suffix(".csv")]
    again = Results.load(path)
    pd.testing.assert_frame_equal(again.table, report.table, check_exact=True)
    assert again.about == json.loads(json.dumps(report.about))
    assert not list(tmp_path.glob("new/*.partial"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "is not what foveate eval writes: it has no number 'format'"),
        ("{}", "is not what foveate eval writes"),
        ("{", "not readable JSON"),
        ('{"format": 99}', "is of a newer version of foveate"),
        ('{"format": 1, "command": null}', "is of an earlier version of foveate: measure again"),
    ],
)
def test_json_of_something_else(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        Results.load(path)
    with pytest.raises(ValueError, match="does not exist; expected what foveate eval wrote"):
        Results.load(tmp_path / "no.json")


def test_damaged_tables_are_refused(report: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    report.save(path)
    beside = path.with_suffix(".csv")
    text = beside.read_text()
    for damaged, words in (
        (text[: text.rindex("\n", 0, -1) + 1], "was cut short or changed: it has"),
        (
            text.replace("run,part", "part,run", 1),
            "is not a table of foveate: its columns are part",
        ),
        ("", "is not a table of foveate"),
        (text.replace(",12.0,", ",twelve,", 1), "has a value that is not a number: .*twelve"),
    ):
        assert damaged != text
        beside.write_text(damaged)
        with pytest.raises(ValueError, match=words):
            Results.load(path)
    beside.unlink()
    with pytest.raises(ValueError, match="does not exist; it belongs to"):
        Results.load(path)


def test_one_number(report: Evaluation) -> None:
    assert one(report.table, "kept", run="demo", part="occlusion", at=0.5) == 24
    with pytest.raises(ValueError, match="the table has 0 rows with metric=kept, run=no, expected"):
        one(report.table, "kept", run="no")


def test_seeds_are_averaged_after_repetitions() -> None:
    def row(value: float, seed: int | None, draw: int | None) -> dict:
        shared = {"run": "a", "part": "occlusion", "metric": "top1", "at": 0.5}
        return {**shared, "seed": seed, "draw": draw, "value": value}

    trained = frame([row(1, 0, 0), row(3, 0, 1), row(6, 1, 0), row(8, 1, 1)])
    (mean, std, n) = over_seeds(trained)[["mean", "std", "count"]].iloc[0]
    assert (mean, n) == (4.5, 2) and std == pytest.approx(5 / 2**0.5)  # of 2 and 7
    opened = frame([row(1, None, 0), row(3, None, 1)])
    (mean, std, n) = over_seeds(opened)[["mean", "std", "count"]].iloc[0]
    assert (mean, n) == (2.0, 2) and std == pytest.approx(2**0.5)
    assert said(2.0, 2**0.5, 1) == "2.0 ± 1.4" and said(2.0) == "2.00"
    assert said(float("nan")) == "missing"


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for name in [name for name in sys.modules if name.startswith("foveate.measure")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"tables need pandas .*pip install 'foveate\[train\]'"):
        __import__("foveate.measure")


# Sheets ------------------------------------------------------------------------------------------


def test_markdown_has_every_table(report: Evaluation) -> None:
    text = markdown(report, ["occlusion.svg"])
    assert "    foveate eval demo\n" in text and "- mask_seeds: 0 1\n" in text
    assert "- commit: abc (" in text and "- machine: one core (" in text
    assert text.count("\n## ") == len(list(sheets(report))) == 4 + 2
    assert "![occlusion](occlusion.svg)" in text
    assert "static(keep=0.5) *" in text and "nobody trained" in text and "| oth\\|er |" in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1
    found = select(report.table, run="demo", part="occlusion", metric="top1", at=0.5)["value"]
    assert f"| 0.5 | 24 | {found.mean():.1f} ± {found.std():.1f} |" in text
    whole = one(report.table, "top1", run="demo", part="occlusion", at=0)
    assert f"| 0 | 49 | {whole:.1f} |" in text  # no deviation of one number


def test_narrow_terminals_lose_what_others_imply(report: Evaluation) -> None:
    wide, narrow = (text_of(list(sheets(report, blocks=False)), width) for width in (140, 78))
    assert "images/s" in wide and "of dense" in wide
    assert "images/s" not in narrow and "1.50 [0.90, 1.60]" in narrow
    assert max(map(len, narrow.splitlines())) <= 78


def test_a_short_run_is_called_a_trial(report: Evaluation) -> None:
    quick = report.table.copy()
    quick.loc[quick["metric"] == "rounds", "value"] = 3
    assert "3 interleaved rounds (a trial, not a result)" in markdown(Results(quick, report.about))
    assert "trial" not in markdown(report)


# Files and pictures ------------------------------------------------------------------------------


def test_files(report: Evaluation, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    names = {path.name for path in write(report, folder)}
    stems = {"accuracy-macs", "accuracy-speed", "occlusion", "pruning"}
    stems |= {"tokens-demo_ats_K=20", "map-demo_ats_K=20"}
    wanted = {f"eval{kind}" for kind in (".json", ".csv", ".md")}
    wanted |= {f"{stem}{kind}" for stem in stems for kind in (".svg", ".png")}
    assert names == wanted == {path.name for path in folder.iterdir()}
    svg = (folder / "occlusion.svg").read_text()
    assert svg.startswith("<?xml") and "NaN" not in svg
    assert (folder / "occlusion.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_that_was_not_measured(report: Evaluation, tmp_path: Path) -> None:
    bare = Results(select(report.table, run="demo", part="accuracy", method=""), report.about)
    assert {path.suffix for path in write(bare, tmp_path)} == {".json", ".csv", ".md"}
    text = (tmp_path / "eval.md").read_text()
    assert "× dense" not in text and "dropped" not in text


def test_lines_of_a_tradeoff(report: Evaluation) -> None:
    alone = of_one(report)
    axes = tradeoff_figure(alone).axes[0]
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["ats", "static (untrained)", "dense"]
    static = next(line for line in axes.lines if line.get_label() == "static (untrained)")
    wanted = [
        one(alone.table, "macs", part="accuracy", method=f"static(keep={keep})") / 1e6
        for keep in (0.5, 0.7)
    ]
    assert static.get_xdata().tolist() == wanted
    assert "images a second at batch 64" in tradeoff_figure(alone, batch=64).axes[0].get_xlabel()


def test_a_line_is_a_method_with_its_other_options(report: Evaluation) -> None:
    found = []
    for method, rate in (
        *(("evit(keep=0.5)", 0.5), ("evit(keep=0.5, rest='drop')", 0.5)),
        *(("evit(keep=0.7, rest='drop')", 0.7), ("tome(r=1)", 1), ("tome(r=13)", 13)),
    ):
        values = {"top1": 50, "macs": 1e6 * rate, "dense_macs": 2e6}
        found += rows("accuracy", values, method=method, rate=rate)
    axes = tradeoff_figure(Results(frame(found, run="demo"))).axes[0]
    lengths = {line.get_label(): len(line.get_xdata()) for line in axes.lines}
    assert lengths == {"evit": 1, "evit(rest='drop')": 2, "tome": 2}


def test_other_dense_models_are_drawn_where_they_do_not_widen_the_axes() -> None:
    def point(run: str, method: str, top1: float, macs: float) -> pd.DataFrame:
        values = {"top1": top1, "macs": macs, "dense_macs": 4e6}
        return frame(rows("accuracy", values, method=method, rate=0.5 if method else None), run=run)

    found = [point("trained", "", 60, 4e6), point("trained", "evit(keep=0.5)", 50, 2e6)]
    found += [point("dense", "", 55, 4e6), point("start", "", 20, 4e6), point("large", "", 55, 8e6)]
    axes = tradeoff_figure(Results(pd.concat(found, ignore_index=True))).axes[0]
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["evit", "trained, dense", "dense"]


def test_bands_are_the_spread_over_seeds(report: Evaluation) -> None:
    axes = dict(figures(report))["occlusion"].axes[0]
    assert len(axes.collections) == 2
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    found = select(report.table, run="demo", part="occlusion", metric="top1", at=0.5)["value"]
    assert found.std() > 0 and heights.max() >= found.mean() + found.std() - 1e-6
    # One seed of training would give a band that looks like certainty: there is none.
    assert not dict(figures(Results(report.table.assign(seed=0))))["occlusion"].axes[0].collections


def test_many_lines_stay_apart() -> None:
    def line(height: int) -> pd.DataFrame:
        return pd.DataFrame({"at": [0.0, 1.0], "mean": [height, height], "std": float("nan")})

    lines = {f"a name that is long enough {n}": line(n) for n in range(14)}
    figure = lines_figure(lines, across="x", up="y")
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines
    }
    assert len(looks) == 14
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= figure.axes[0].get_window_extent().x1  # it covers no data
    assert legend.x1 <= figure.bbox.x1 + 1 and legend.y0 >= -1
    # One line without a name, of the first model of a comparison, needs no legend.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not lines_figure({"": line(0)}, across="x", up="y").legends


def test_a_single_point_has_a_bar_for_its_spread() -> None:
    found = [
        frame(
            rows("dense", {"miou": miou, "backbone_macs": 1e9}, method=method, seed=seed), run="a"
        )
        for method, scores in (("", (0.24, 0.25)), ("svit(keep=0.4)", (0.23, 0.25)))
        for seed, miou in enumerate(scores)
    ]
    (axes,) = dict(figures(Results(pd.concat(found, ignore_index=True))))["miou-macs"].axes
    assert "\nbar: standard deviation over seeds of training" in axes.get_xlabel()
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert bar[:, 1] == pytest.approx([24 - 2**0.5, 24 + 2**0.5])


def test_how_runs_converge_takes_two_epochs() -> None:
    def drawn(epochs: int) -> set[str]:
        found = [
            frame(rows("training", {"val/accuracy": 50.0 + epoch}, at=epoch), run="a")
            for epoch in range(1, epochs + 1)
        ]
        return set(dict(figures(Results(pd.concat(found, ignore_index=True)))))

    assert drawn(2) == {"convergence-models"} and drawn(1) == set()


# Speed -------------------------------------------------------------------------------------------


def test_speed_is_over_the_own_dense_model() -> None:
    model = demo_vit()
    images = next(iter(demo_batches(4, 4)()))[0]
    told = []
    table = speeds(
        {"a": variants(model, ["evit(keep=0.3)"]), "b": {"dense": model}},
        {"a": images, "b": images[:2]},
        rounds=3,
        progress=lambda done, total: told.append((done, total)),
    )
    pairs = list(dict.fromkeys(zip(table["run"], table["method"], table["at"], strict=True)))
    assert pairs == [("a", "", 4), ("a", "evit(keep=0.3)", 4), ("b", "", 2)]
    own = select(table, run="a", method="evit(keep=0.3)")
    assert one(own, "low") <= one(own, "times") <= one(own, "high") and one(own, "rounds") == 3
    assert one(table, "per_second", run="b") > 0
    assert told[-1] == (6, 6)


def test_detectors_and_segmenters_have_tables_of_their_own() -> None:
    costs = {"macs": 2e6, "dense_macs": 2e6, "backbone_macs": 1e6, "usage": 1.0}
    scores = {"finder": {"box_ap": 0.25, "mask_ap": 0.2}, "painter": {"miou": 0.5}}
    found = [rows("dense", {**own, **costs}, run=run) for run, own in scores.items()]
    expected = [("dense", run, "", None, 1) for run in ("finder", "painter", "late")]
    both, one_kind = (
        list(sheets(Results(frame(table), {"expected": expected})))
        for table in (sum(found, []), found[1])
    )
    assert [sheet.title for sheet in both] == ["Scores of detectors, %", "Scores of segmenters, %"]
    boxes, regions = (sheet.table for sheet in both)
    assert list(boxes["model"]) == ["finder", "late"] and "mean IoU" not in boxes
    assert list(regions["model"]) == ["painter", "late"] and "box AP" not in regions
    assert list(regions["mean IoU"]) == ["50.0", "missing"]
    assert [sheet.title for sheet in one_kind] == ["Scores, %"]
    assert list(one_kind[0].table["model"]) == ["finder", "painter", "late"]


# Curves of runs ----------------------------------------------------------------------------------


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_metrics_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "metrics.csv",
        "step,epoch,train/loss,val/accuracy\n1,0,2.3,\n5,0,,61.5\n9,1,,70\n9,1,,71.25\n14,2,,8",
    )
    # Epochs that are over; the last line was cut short.
    assert curve(path, "val/accuracy") == {1: 61.5, 2: 71.25}
    assert curve(tmp_path, "val/accuracy") == curve(path, "val/accuracy")
    assert curve(path, "train/loss") == {1: 2.3}
    assert columns(tmp_path) == ["step", "epoch", "train/loss", "val/accuracy"]
    own = written(tmp_path / "own.csv", "epoch,probe/knn\n100,5\n200,6\n")
    assert curve(own, "probe/knn") == {100: 5, 200: 6}  # as it stands


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; expected the metrics of a run"):
        curve(tmp_path, "val/accuracy")
    path = written(tmp_path / "metrics.csv", "step,epoch,val/acuracy\n1,0,3\n")
    with pytest.raises(ValueError, match="unknown column 'val/accuracy'; did you mean 'val/acu"):
        curve(path, "val/accuracy")
    written(path, "step,epoch,val/accuracy\n1,0,\n")
    with pytest.raises(ValueError, match="nothing was scored"):
        curve(path, "val/accuracy")
    written(path, "step,epoch,val/accuracy\n1,0,high\n")
    with pytest.raises(ValueError, match="line 2: epoch '0' and val/accuracy 'high'"):
        curve(path, "val/accuracy")
    written(path, "step,epoch,val/accuracy\n1,0,nan\n")
    with pytest.raises(ValueError, match="line 2: val/accuracy is nan, expected a number"):
        curve(path, "val/accuracy")
