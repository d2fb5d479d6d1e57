"""Reports: files that parse back, tables, pictures, and convergence."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from batches import demo_batches

import foveate
from foveate.bench.machine import facts
from foveate.data.demo import demo_vit
from foveate.evaluate import (
    Entry,
    Report,
    Speed,
    convergence,
    measure,
    occlusion,
    pruning,
    speeds,
    token_statistics,
    variants,
    write,
)
from foveate.evaluate.convergence import read_metric
from foveate.evaluate.figures import lines_figure, occlusion_figure, tradeoff_figure
from foveate.evaluate.tables import markdown, sheets


@pytest.fixture(scope="module")
def report() -> Report:
    model, batches = demo_vit(), demo_batches(12, 6)
    found, untrained = variants(model, ["ats(K=20)", "static"], [0.5, 0.7])
    entry = Entry("demo", {"family": "timm", "unreadable": 0})
    entry.rows = {
        n: replace(r, untrained=n in untrained) for n, r in measure(found, batches).items()
    }
    entry.speeds = {
        name: Speed(1.5 if place else 1.0, 0.9, 1.6, 100.0 + place, 64, 30, 0.1)
        for place, name in enumerate(found)
    }
    entry.occlusion = occlusion(model, batches, ratios=[0, 0.5, 1], seeds=2)
    entry.pruning = pruning(model, batches, rates=[0.5], seeds=2)
    reduced = foveate.apply(model, "ats(K=20)")
    entry.statistics = {"ats(K=20)": token_statistics(reduced, batches)}
    other = replace(entry, label="oth|er", statistics={})
    settings = {"data": "fashion-mnist", "limit": 12, "mask_seeds": [0, 1], "rates": [0.5]}
    return Report("foveate eval demo", None, facts("cpu"), settings, [entry, other])


def test_json_parses_back(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "eval.json")
    again = Report.load(tmp_path / "eval.json")
    assert again == report
    assert again.entry("demo").occlusion.top1[1].mean == report.entries[0].occlusion.top1[1].mean
    with pytest.raises(ValueError, match="no model is called 'x' here; there are demo, oth|er"):
        again.entry("x")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1, "command": null}', "{"])
def test_json_of_something_else(text: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not what foveate eval writes|not readable JSON"):
        Report.load(path)
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is of a newer version"):
        Report.load(path)
    with pytest.raises(ValueError, match="does not exist; expected what foveate eval wrote"):
        Report.load(tmp_path / "no.json")


def test_csv_has_every_number(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(report.csv())))
    entry = report.entries[0]
    own = [line for line in lines if line["model"] == "demo"]
    by_part = {part: [line for line in own if line["part"] == part] for part in
               ("accuracy", "occlusion", "pruning")}  # fmt: skip
    assert len(own) == 4 + 3 * 2 + 3
    for line, row in zip(by_part["accuracy"], entry.rows.values(), strict=True):
        assert line["method"] == row.name and float(line["top1"]) == row.accuracy.top1
        assert float(line["macs"]) == row.macs and int(line["images"]) == 12
        assert float(line["images_per_second"]) == entry.speeds[row.name].per_second
        assert line["untrained_method"] == str(int("static" in row.name))
    found = [(float(line["ratio"]), int(line["seed"])) for line in by_part["occlusion"]]
    assert found == [(ratio, seed) for ratio in (0, 0.5, 1) for seed in (0, 1)]
    assert [line["seed"] for line in by_part["pruning"]] == ["0", "1", ""]


def test_markdown_has_every_table(report: Report) -> None:
    text = markdown(report, ["occlusion.svg"])
    assert "    foveate eval demo\n" in text and "- mask_seeds: 0 1\n" in text
    assert text.count("\n## ") == len(list(sheets(report))) == 5
    assert "![occlusion](occlusion.svg)" in text
    assert "static(keep=0.5) *" in text and "nobody trained" in text and "| oth\\|er |" in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1
    curve = report.entries[0].occlusion
    assert f"| 0.5 | 24 | {curve.top1[1]} | 24 |" in text
    assert f"| 0 | 49 | {curve.top1[0].mean:.1f} | 49 |" in text  # no spread of one number


def test_a_short_run_is_called_a_trial(report: Report) -> None:
    entry = report.entries[0]
    quick = replace(entry, speeds={n: replace(s, rounds=3) for n, s in entry.speeds.items()})
    assert "3 interleaved rounds (a trial, not a result)" in markdown(
        replace(report, entries=[quick])
    )
    assert "trial" not in markdown(report)


def test_files(report: Report, tmp_path: Path) -> None:
    names = {path.name for path in write(report, tmp_path / "new" / "folder")}
    stems = {"accuracy-macs", "accuracy-speed", "occlusion", "pruning"}
    stems |= {"tokens-demo_ats_K=20", "map-demo_ats_K=20"}
    wanted = {f"eval{kind}" for kind in (".json", ".csv", ".md")}
    wanted |= {f"{stem}{kind}" for stem in stems for kind in (".svg", ".png")}
    assert names == wanted == {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    svg = (tmp_path / "new" / "folder" / "occlusion.svg").read_text()
    assert svg.startswith("<?xml") and "NaN" not in svg
    assert (tmp_path / "new" / "folder" / "occlusion.png").read_bytes().startswith(b"\x89PNG")
    json.loads((tmp_path / "new" / "folder" / "eval.json").read_text())


def test_nothing_is_drawn_that_was_not_measured(report: Report, tmp_path: Path) -> None:
    rows = {"dense": report.entries[0].rows["dense"]}
    bare = replace(report, entries=[Entry("demo", {"unreadable": 0}, rows)])
    assert {path.suffix for path in write(bare, tmp_path)} == {".json", ".csv", ".md"}
    text = (tmp_path / "eval.md").read_text()
    assert "images/s" not in text and "dropped" not in text


def test_lines_of_a_tradeoff(report: Report) -> None:
    axes = tradeoff_figure(report.entries[:1]).axes[0]
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["ats", "static (untrained)", "dense"]
    static = next(line for line in axes.lines if line.get_label() == "static (untrained)")
    rows = report.entries[0].rows
    wanted = [rows[f"static(keep={keep})"].macs / 1e6 for keep in (0.5, 0.7)]
    assert static.get_xdata().tolist() == wanted
    speed = tradeoff_figure(report.entries[:1], speed=True).axes[0]
    assert "images a second at batch 64" in speed.get_xlabel()


def test_a_line_is_a_method_with_its_other_options(report: Report) -> None:
    row = report.entries[0].rows["ats(K=20)"]
    names = ("evit(keep=0.5)", "evit(keep=0.5, rest='drop')", "evit(keep=0.7, rest='drop')")
    rates = (0.5, 0.5, 0.7)
    rows = {
        n: replace(row, name=n, method="evit", rate=r) for n, r in zip(names, rates, strict=True)
    }
    axes = tradeoff_figure([Entry("demo", {}, rows)]).axes[0]
    found = {line.get_label(): len(line.get_xdata()) for line in axes.lines}
    assert found == {"evit": 1, "evit(rest='drop')": 2}


def test_bands_are_the_spread_over_seeds(report: Report) -> None:
    curve = report.entries[0].occlusion
    axes = occlusion_figure({"one": curve, "two": curve}).axes[0]
    assert len(axes.collections) == 2
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    middle = curve.top1[1]
    assert heights.max() >= middle.mean + middle.spread - 1e-6


def test_many_lines_stay_apart() -> None:
    from foveate.evaluate.figures import Line

    lines = [Line(f"a name that is long enough {n}", (0.0, 1.0), (n, n)) for n in range(14)]
    figure = lines_figure(lines, across="x", up="y")
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines
    }
    assert len(looks) == 14
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= figure.axes[0].get_window_extent().x1  # it covers no data
    assert legend.x1 <= figure.bbox.x1 + 1 and legend.y0 >= -1


# Speed -------------------------------------------------------------------------------------------


def test_speed_is_over_the_own_dense_model() -> None:
    model = demo_vit()
    images = next(iter(demo_batches(4, 4)()))[0]
    found, _ = variants(model, ["evit(keep=0.3)"])
    told = []
    timed = speeds(
        {"a": found, "b": {"dense": model}},
        {"a": images, "b": images[:2]},
        rounds=3,
        progress=lambda done, total: told.append((done, total)),
    )
    assert list(timed) == ["a", "b"] and list(timed["a"]) == ["dense", "evit(keep=0.3)"]
    one = timed["a"]["evit(keep=0.3)"]
    assert one.low <= one.ratio <= one.high and one.batch == 4 and one.rounds == 3
    assert timed["b"]["dense"].batch == 2 and timed["b"]["dense"].per_second > 0
    assert told[-1] == (6, 6)


# Convergence -------------------------------------------------------------------------------------


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_metrics_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "metrics.csv",
        "step,epoch,train/loss,val/accuracy\n1,0,2.3,\n5,0,,61.5\n9,1,,70\n9,1,,71.25\n14,2,,8",
    )
    assert read_metric(path) == {0: 61.5, 1: 71.25}  # the last line was cut short
    assert read_metric(tmp_path) == read_metric(path)
    assert read_metric(path, "train/loss") == {0: 2.3}


def test_convergence_of_several_runs(tmp_path: Path) -> None:
    for name, last in (("full", 80), ("masked", 84)):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "metrics.csv", f"step,epoch,val/accuracy\n1,0,50\n2,1,{last}\n")
    figure = convergence({name: tmp_path / name for name in ("full", "masked")})
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"full": [50, 80], "masked": [50, 84]}
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 2]  # epochs that are over


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run was given"):
        convergence({})
    with pytest.raises(ValueError, match="does not exist; expected the metrics of a run"):
        read_metric(tmp_path)
    path = written(tmp_path / "metrics.csv", "step,epoch,val/acuracy\n1,0,3\n")
    with pytest.raises(ValueError, match="unknown column 'val/accuracy'; did you mean 'val/acu"):
        read_metric(path)
    written(path, "step,epoch,val/accuracy\n1,0,\n")
    with pytest.raises(ValueError, match="nothing was validated"):
        read_metric(path)
    written(path, "step,epoch,val/accuracy\n1,0,high\n")
    with pytest.raises(ValueError, match="line 2: epoch '0' and val/accuracy 'high'"):
        read_metric(path)
