"""RAUC and epochs to match: by hand, by dense sums, and from the folders of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.cli import main
from foveate.measure import Results, one, select
from foveate.measure.rauc import MEAN, compare, epochs_to_match, figure, rauc

BASE = {100.0: 30.0, 200.0: 40.0, 300.0: 45.0, 400.0: 47.0}
AHEAD = {100.0: 34.0, 250.0: 46.0, 400.0: 49.0}


def dense(base: Mapping[float, float], other: Mapping[float, float], e1: float, e2: float) -> float:
    """The equation by a sum over many small steps."""
    at = np.linspace(e1, e2, 2_000_001)
    one, two = (np.interp(at, sorted(c), [c[e] for e in sorted(c)]) for c in (base, other))
    return float((two - one[0]).mean() / (one - one[0]).mean())


def folder(
    path: Path, scores: Mapping[float, float], epochs: int | None = 400, data: str = "a"
) -> Path:
    """A run: lines of training and lines of validation, whose epochs are counted from 0."""
    path.mkdir(parents=True)
    lines = ["epoch,step,train/loss,probe/linear,val/loss"]
    for number, (epoch, score) in enumerate(scores.items()):
        lines += [f"{epoch - 1:g},{number},0.5,,", f"{epoch - 1:g},{number},,{score},{1 / score}"]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    if epochs is not None:
        (path / "recipe.yaml").write_text(f"loop: {{epochs: {epochs}}}\nprobe: {{data: {data}}}\n")
    return path


# The equation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "other", "expected"),
    [  # linear probes at 400 and 800 epochs, Table 2; what is printed there is 1.20 to 1.23
        ((68.5, 72.7), (72.8, 74.1), 2.36),
        ((57.4, 63.9), (63.6, 64.8), 2.09),
        ((63.8, 65.4), (66.1, 66.8), 3.31),
        ((32.2, 39.2), (38.7, 40.3), 2.09),
    ],
)
def test_two_points(base: tuple[float, float], other: tuple[float, float], expected: float) -> None:
    one, two = ({400.0: scores[0], 800.0: scores[1]} for scores in (base, other))
    by_hand = ((other[0] - base[0]) + (other[1] - base[0])) / (base[1] - base[0])
    assert rauc(one, two, 400, 800) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(expected, abs=0.005 + 1e-9)


def test_a_run_against_itself() -> None:
    for start, end in ((100, 400), (130, 170), (222.5, 400)):
        assert rauc(BASE, BASE, start, end) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("start", "end"), [(100, 400), (120, 260), (210, 240), (250, 300)])
def test_agrees_with_a_dense_sum(start: float, end: float) -> None:
    expected = dense(BASE, AHEAD, start, end)
    assert rauc(BASE, AHEAD, start, end) == pytest.approx(expected, rel=1e-5)
    assert rauc(AHEAD, BASE, start, end) == pytest.approx(dense(AHEAD, BASE, start, end), rel=1e-5)


def test_by_hand() -> None:
    """Base 0 to 10 over 10 epochs: area 50. Other 5 up to epoch 5, then up to 15: 25 + 50."""
    base, other = {0: 0, 10: 10}, {0: 5, 5: 5, 10: 15}
    assert rauc(base, other, 0, 10) == pytest.approx(1.5)
    # From 5 on the base starts at 5 and gains 12.5; the other starts there too and gains 25.
    assert rauc(base, other, 5, 10) == pytest.approx(2)


def test_shift_and_scale_change_nothing() -> None:
    expected = rauc(BASE, AHEAD, 150, 350)
    for scale, shift in ((1, -80), (0.01, 0), (7, 1000)):
        one, two = ({e: scale * s + shift for e, s in c.items()} for c in (BASE, AHEAD))
        assert rauc(one, two, 150, 350) == pytest.approx(expected)


def test_above_one_means_ahead() -> None:
    for lead in (-3, -0.1, 0.1, 3):
        other = {epoch: score + lead for epoch, score in BASE.items()}
        assert (rauc(BASE, other, 100, 400) > 1) == (lead > 0)
    head_start = {**BASE, 100.0: 31.0}  # all else equal
    assert rauc(BASE, head_start, 100, 400) > 1


def test_order_of_points_does_not_matter() -> None:
    backwards = dict(reversed(list(BASE.items())))
    assert rauc(backwards, AHEAD, 100, 400) == rauc(BASE, AHEAD, 100, 400)
    assert epochs_to_match(backwards, 400, AHEAD) == epochs_to_match(BASE, 400, AHEAD)


@pytest.mark.parametrize("base", [{1: 5, 2: 5, 3: 5}, {1: 5, 2: 4, 3: 3}, {1: 0, 3: 0}])
def test_a_base_that_gains_nothing(base: dict[float, float]) -> None:
    with pytest.raises(ValueError, match="the base gains nothing from 1 to 3, so RAUC is und"):
        rauc(base, {1: 1, 3: 9})


def test_rounding_is_no_gain() -> None:
    with pytest.raises(ValueError, match="gains nothing"):
        rauc({1: 0.3, 2: 0.1 + 0.2}, {1: 1, 2: 2})


def test_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="50 lies outside the curve base, which goes from.*100"):
        rauc(BASE, AHEAD, 50, 400)
    with pytest.raises(ValueError, match=r"401 lies outside the curve other.* 50 to 400"):
        rauc({**BASE, 500: 50}, {50: 1, **AHEAD}, 100, 401)
    for start, end in ((200, 200), (300, 200), (math.nan, 200)):
        with pytest.raises(ValueError, match="the range must begin before it ends"):
            rauc(BASE, AHEAD, start, end)
    with pytest.raises(ValueError, match="the curve other needs at least 2 points, got 1"):
        rauc(BASE, {100: 1}, 100, 100.5)
    with pytest.raises(ValueError, match="share no range: base 100 to 400, other 500 to"):
        rauc(BASE, {500: 1, 600: 2})
    assert rauc(BASE, {150: 35, 300: 46}) == rauc(BASE, {150: 35, 300: 46}, 150, 300)


# Epochs to match ---------------------------------------------------------------------------------


def test_epochs_to_match() -> None:
    # 47 lies a third of the way from 46 at 250 to 49 at 400.
    assert epochs_to_match(BASE, 400, AHEAD) == pytest.approx(300)
    # Between points of the base too: 42.5 at 250; from 34 at 100, 8 points in 100 epochs.
    assert epochs_to_match(BASE, 250, AHEAD) == pytest.approx(100 + 150 * 8.5 / 12)
    assert epochs_to_match(BASE, 400, BASE) == 400
    assert epochs_to_match(AHEAD, 400, BASE) is None
    assert epochs_to_match(BASE, 100, AHEAD) == 100  # at once
    assert epochs_to_match({1: 1, 2: 2}, 2, {1: 0, 2: 3, 3: 0, 4: 3}) == pytest.approx(5 / 3)
    assert epochs_to_match({1: 1, 2: 2}, 2, {1: 1.5, 2: 0, 3: 3}) == pytest.approx(8 / 3)
    with pytest.raises(ValueError, match="500 lies outside the curve base"):
        epochs_to_match(BASE, 500, AHEAD)


# Runs --------------------------------------------------------------------------------------------


def numbers(found: Any, run: str, *names: str) -> list[float]:
    return [one(found.table, name, part="rauc", run=run) for name in names]


def test_runs_that_were_scored_too_seldom(tmp_path: Path) -> None:
    good = folder(tmp_path / "good", BASE)
    run = folder(tmp_path / "run", {100: 1, 200: 2})
    with pytest.raises(ValueError, match="run holds 2 scored checkpoints; RAUC needs at least 3: "):
        compare([good], [run])
    with pytest.raises(ValueError, match="good was never scored by probe/knn: pre-train with"):
        compare([good], [run], metric="probe/knn")
    with pytest.raises(ValueError, match="does not exist; expected the metrics of a run"):
        compare([tmp_path], [good])
    lost = folder(tmp_path / "lost", {100: 1, 200: math.nan, 300: 2})
    with pytest.raises(ValueError, match="probe/linear is nan, expected a number"):
        compare([good], [lost])


def test_one_pair(tmp_path: Path) -> None:
    base, mto = folder(tmp_path / "base", BASE), folder(tmp_path / "mto", AHEAD)
    found = compare([base], [mto])
    about, run = found.about, "mto over base"
    assert (about["from"], about["to"], about["at"]) == (100, 400, 400) and len(about["notes"]) == 1
    ends = numbers(found, run, "base_start", "base_end", "other_start", "other_end")
    assert ends == [30, 47, 34, 49]
    assert numbers(found, run, "rauc") == numbers(found, MEAN, "rauc")
    assert numbers(found, run, "rauc") == [rauc(BASE, AHEAD, 100, 400)]
    assert numbers(found, run, "match", "saved") == [pytest.approx(300), pytest.approx(0.25)]
    other = compare([base], [mto], start=150, end=300, at=200)
    assert numbers(other, run, "rauc", "goal") == [rauc(BASE, AHEAD, 150, 300), 40]


def test_over_seconds_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Epochs of the other run take twice as long: its lead by epochs is none by time."""
    scores = {2: 30, 4: 40, 8: 50}
    base, mto = folder(tmp_path / "base", scores), folder(tmp_path / "mto", scores)
    with pytest.raises(ValueError, match="base does not say how long its epochs took: seconds.csv"):
        compare([base], [mto], over="seconds")
    for run, each in ((base, 10), (mto, 20)):
        lines = [f"{epoch},{each * epoch}" for epoch in (2, 4, 8)]
        (run / "seconds.csv").write_text("\n".join(["epoch,seconds", *lines]) + "\n")
    found = compare([base], [mto], over="seconds")
    assert (found.about["from"], found.about["to"], found.about["at"]) == (40, 80, 80)
    # From second 40 to 80 the base goes from 40 to 50, the other run from 30 to 40.
    assert numbers(found, "mto over base", "rauc") == [pytest.approx(-1)]
    assert "match" in set(found.table["metric"])
    assert numbers(found, "mto over base", "match") == [pytest.approx(160)]
    assert numbers(compare([base], [mto]), "mto over base", "rauc") == [pytest.approx(1)]
    assert main(["rauc", str(base), str(mto), "--over", "seconds"]) == 0
    assert "40 to 80 seconds" in capsys.readouterr().out
    assert "seconds of pre-training" in figure(found).axes[0].get_xlabel()
    with pytest.raises(ValueError, match="over must be one of 'epochs', 'seconds'"):
        compare([base], [mto], over="hours")
    (mto / "seconds.csv").write_text("epoch,seconds\n2,40\n4,80\n")
    with pytest.raises(ValueError, match="how long epoch 8 took is not known"):
        compare([base], [mto], over="seconds")


def test_as_good_at_the_first_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When it became so nobody knows."""
    base = folder(tmp_path / "base", BASE)
    mto = folder(tmp_path / "mto", {100: 50, 200: 51, 400: 52})
    found = compare([base], [mto])
    assert numbers(found, "mto over base", "match", "saved", "at_once") == [100, 0.75, 1]
    ahead = compare([base], [folder(tmp_path / "ahead", AHEAD)])
    assert "at_once" not in set(ahead.table["metric"])
    assert main(["rauc", str(base), str(mto)]) == 0
    text = capsys.readouterr().out
    assert "<= 100.0" in text and ">= 75%" in text and "maybe before it" in text
    words = [text.get_text() for text in figure(found).axes[0].texts]
    assert "at least 75% fewer epochs" in words


def test_a_base_that_sinks_is_refused(tmp_path: Path) -> None:
    """To be as good as it is no feat: there is nothing to match, nor to save."""
    run = folder(tmp_path / "sinking", {1: 38.5, 2: 37, 3: 36})
    with pytest.raises(ValueError, match="the base gains nothing from 1 to 3, so RAUC is und"):
        compare([run], [folder(tmp_path / "other", {1: 1, 2: 2, 3: 3})])


def test_the_range_is_what_runs_share(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", BASE)
    mto = folder(tmp_path / "mto", {150: 1, 200: 2, 350: 3, 800: 4})
    found = compare([base], [mto])
    assert [found.about[name] for name in ("from", "to", "at")] == [150, 400, 400]
    assert not {"match", "saved"} & set(found.table["metric"])  # never as good
    with pytest.raises(ValueError, match="100 lies outside the curve mto, which goes from.*150"):
        compare([base], [mto], start=100)
    with pytest.raises(ValueError, match="500 lies outside the curve base"):
        compare([base], [mto], at=500)
    late = folder(tmp_path / "late", {500: 1, 600: 2, 700: 3})
    with pytest.raises(ValueError, match="share no range: base 100 to 400, late 500 to"):
        compare([base], [late])


def test_seeds(tmp_path: Path) -> None:
    again = {epoch: 1.1 * score for epoch, score in BASE.items()}
    second = {**again, 400.0: 60.0}
    mine = [folder(tmp_path / f"base-{n}", c) for n, c in enumerate((BASE, again))]
    theirs = [folder(tmp_path / f"mto-{n}", c) for n, c in enumerate((AHEAD, second))]
    found = compare(mine, theirs)
    each = [rauc(BASE, AHEAD, 100, 400), rauc(again, second, 100, 400)]
    assert [one(found.table, "rauc", seed=seed) for seed in (0, 1)] == pytest.approx(each)
    at = [100.0, 200.0, 250.0, 300.0, 400.0]
    mid = {e: 1.05 * float(np.interp(e, list(BASE), list(BASE.values()))) for e in at}
    top = {
        e: float(np.mean([np.interp(e, list(c), list(c.values())) for c in (AHEAD, second)]))
        for e in at
    }
    assert numbers(found, MEAN, "rauc") == [pytest.approx(rauc(mid, top, 100, 400))]
    with pytest.raises(ValueError, match="as many runs of both, got 2 and 1"):
        compare(mine, theirs[:1])


def test_a_seed_without_an_answer(tmp_path: Path) -> None:
    flat = folder(tmp_path / "flat", {100: 60, 200: 60, 400: 60})
    mine = [folder(tmp_path / "base", BASE), flat]
    theirs = [folder(tmp_path / f"mto-{n}", AHEAD) for n in range(2)]
    found = compare(mine, theirs)
    (note,) = found.about["notes"][1:]
    assert note == (
        "mto-1 over flat: the base gains nothing from 100 to 400, so RAUC is undefined."
    )
    known = select(found.table, part="rauc", metric=["rauc", "match"])
    assert set(known["run"]) == {"mto-0 over base", MEAN}


def test_a_loss_is_better_below(tmp_path: Path) -> None:
    base, mto = folder(tmp_path / "base", BASE), folder(tmp_path / "mto", AHEAD)
    found = compare([base], [mto], metric="val/loss")
    one_, two = ({e: -1 / s for e, s in c.items()} for c in (BASE, AHEAD))
    ratio, goal, end, match = numbers(found, "mto over base", "rauc", "goal", "base_end", "match")
    assert ratio == pytest.approx(rauc(one_, two, 100, 400)) and ratio > 1
    assert end == goal == pytest.approx(1 / 47)
    assert match == pytest.approx(epochs_to_match(one_, 400, two))


def test_schedules_of_different_length(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", BASE, epochs=800)
    found = compare([base], [folder(tmp_path / "mto", AHEAD, epochs=400)])
    assert found.about["notes"][1:] == [
        "Warning: loop.epochs differ (base 800, mto 400): separately annealed schedules, "
        "a different experiment."
    ]
    unknown = folder(tmp_path / "unknown", AHEAD, epochs=None)
    assert len(compare([base], [unknown]).about["notes"]) == 1
    (base / "recipe.yaml").write_text("loop: 3\n")
    with pytest.raises(
        ValueError, match=r"recipe.yaml is not the recipe of a run: expected a number"
    ):
        compare([base], [base])


def test_runs_on_different_data_are_refused(tmp_path: Path) -> None:
    base, mto = folder(tmp_path / "base", BASE), folder(tmp_path / "mto", AHEAD, data="b")
    with pytest.raises(
        ValueError, match="differ in probe.data, so RAUC means nothing: base a, mto"
    ):
        compare([base], [mto])


# The command -------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, mto = folder(tmp_path / "base", BASE), folder(tmp_path / "mto", AHEAD, epochs=800)
    out = tmp_path / "out"
    assert main(["rauc", str(base), str(mto), "--from", "150", "--to", "350"]) == 0
    text = capsys.readouterr().out
    expected = rauc(BASE, AHEAD, 150, 350)
    assert "probe/linear, 150 to 350 epochs" in text
    (line,) = (line.split() for line in text.splitlines() if "mto over base" in line)
    assert line[3:] == ["35.00", "46.00", "38.00", "48.00", f"{expected:.3f}", "300.0", "25%"]
    assert text.count("inside one schedule") == 1
    assert text.count("Warning: loop.epochs differ (base 400, mto 800)") == 1
    assert "wrote" not in text and not out.exists()

    assert main(["rauc", str(base), str(mto), "--at", "200", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("wrote") == 4
    names = sorted(path.name for path in out.iterdir())
    assert names == ["rauc.csv", "rauc.json", "rauc.png", "rauc.svg"]
    found = Results.load(out / "rauc.json", "foveate rauc")
    about = found.about
    assert (about["from"], about["to"], about["at"]) == (100, 400, 200)
    assert about["metric"] == "probe/linear" and not about["lower_is_better"]
    curve = select(found.table, part="curve", run="base")
    assert dict(zip(curve["at"], curve["value"], strict=True)) == BASE
    assert numbers(found, "mto over base", "rauc") == [rauc(BASE, AHEAD, 100, 400)]
    match = epochs_to_match(BASE, 200, AHEAD)
    assert numbers(found, "mto over base", "match") == [pytest.approx(match)]
    assert "a different experiment" in about["notes"][1]
    assert (out / "rauc.png").read_bytes().startswith(b"\x89PNG")


def test_command_with_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder(tmp_path / f"base-{n}", BASE)) for n in range(2)]
    runs += [str(folder(tmp_path / f"mto-{n}", AHEAD)) for n in range(2)]
    flat = {100.0: 60.0, 200.0: 59.0, 400.0: 59.0}
    runs += [str(folder(tmp_path / f"flat-{n}", flat)) for n in range(2)]
    seeds = ["--more-base", runs[1], "--more-mto", runs[3]]
    out = str(tmp_path / "out")
    assert main(["rauc", runs[0], runs[2], *seeds, "--out", out]) == 0
    text = capsys.readouterr().out
    expected = f"{rauc(BASE, AHEAD, 100, 400):.3f}"
    assert text.count(expected) == 4 and f"{expected} ± 0.000" in text
    assert "mto-1 over base-1" in text and "mean ± std (n 2)" in text
    # One seed has nothing to be ahead of: the table says so, and the picture is drawn.
    seeds = ["--more-base", runs[5], "--more-mto", runs[3]]
    assert main(["rauc", runs[0], runs[2], *seeds, "--out", out]) == 0
    text = capsys.readouterr().out
    assert "(1 of 2)" in text and "mto-1 over flat-1: the base gains nothing" in text
    # Nor has any: there is nothing to say.
    assert main(["rauc", runs[4], runs[0], "--more-base", runs[5], "--more-mto", runs[1]]) == 2
    assert "the base gains nothing from 100 to 400" in capsys.readouterr().err


def test_command_with_one_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder(tmp_path / "run", BASE))
    assert main(["rauc", run, run, "--metric", "val/loss"]) == 0
    assert " 1.000 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({100: 1, 200: 2}, [], "mto holds 2 scored checkpoints; RAUC needs at least 3: pre-train"),
        (AHEAD, ["--to", "900"], "900 lies outside the curve base, which goes from 100"),
        (AHEAD, ["--from", "300", "--to", "200"], "the range must begin before it ends, got 300"),
        (
            AHEAD,
            ["--metric", "probe/knn"],
            "base was never scored by probe/knn: pre-train with probe.data",
        ),
        (AHEAD, ["--at", "0"], "0 lies outside the curve base"),
    ],
)
def test_command_refuses(
    scores: dict[float, float],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, mto = folder(tmp_path / "base", BASE), folder(tmp_path / "mto", scores)
    assert main(["rauc", str(base), str(mto), *options]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_the_start_of_training_is_no_reference(tmp_path: Path) -> None:
    path = tmp_path / "base.csv"
    path.write_text("epoch,probe/linear\n0,10\n1,20\n2,30\n")
    with pytest.raises(ValueError, match="must lie after the start of training, got 0"):
        compare([path], [path], at=0)
