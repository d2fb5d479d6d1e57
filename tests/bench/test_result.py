"""What a benchmark says: rows, what may be compared, from which batch on it pays, the plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import vit
from text import text_of

import foveate
from foveate import bench
from foveate.bench import Cell, Result, Timings
from foveate.measure import Results, frame, one
from foveate.measure.benchmark import (
    break_even,
    cell_sheet,
    closing,
    compare,
    figure,
    load,
    opening,
    pairs,
    table_of,
)
from foveate.measure.style import save
from foveate.measure.table import pd, rows
from foveate.timing import AGAIN, DENSE, UNFUSED

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def cell(
    batch: int, speed: float, *, run: str = "r", name: str = "evit", **options: object
) -> Cell:
    """A cell in which a method is so many times faster; the A/A ratio strays by 2 %."""
    dense = [100.0 + i for i in range(30)]
    wobble = [t * (0.98 if i % 2 else 1.02) for i, t in enumerate(dense)]
    samples = {
        DENSE: dense,
        AGAIN: wobble,
        UNFUSED: [t * 1.25 for t in dense],
        f"oracle of {name}": [t / speed * 0.9 for t in dense],
        name: [t / speed for t in dense],
    }
    facts = {
        "oracle": f"oracle of {name}",
        "tokens": {
            "fed_mean_per_block": [197.0, 140.0],
            "fed_last_block_min": 70,
            "fed_last_block_max": 72,
        },
        "macs": 0.65,
        "acting_blocks": 3,
        "depth": 12,
        "parameters": "untrained",
    }
    settings: dict = dict(model="m", dtype="fp32", compiled=False, unfused=None)
    return Cell(
        **{**settings, **options},
        batch=batch,
        run=run,
        timings=Timings(samples, 2),
        methods={name: facts},
        memory={key: 1000 for key in samples} | {name: 900},
    )


def result(*cells: Cell) -> Result:
    machine = {"torch": "t", "timm": "t", "python": "p", "cpu": "c", "threads": 1, "device": "cpu"}
    return Result("foveate bench", None, machine, {"images": "made"}, list(cells))


def words(results: Results, width: int = 140) -> str:
    text = text_of([cell_sheet(results)], width)
    return "\n".join([*opening(results), text, *closing(results)])


def test_a_cell_says_what_its_samples_say() -> None:
    table = table_of(result(cell(8, 1.5))).table

    def number(metric: str, method: str = "evit") -> float:
        return one(table, metric, part="speed", run="m, fp32", at=8, method=method)

    assert number("times") == pytest.approx(1.5) and number("share") == pytest.approx(0.9)
    assert number("oracle") == pytest.approx(1.5 / 0.9)
    assert number("times", UNFUSED) == pytest.approx(0.8)
    assert number("spread", "") == pytest.approx(0.02, abs=1e-3)
    assert number("memory") == 0.9 and number("macs") == 0.65 and number("rounds", "") == 30
    # A tenth of the oracle's time more, over three blocks, of a twelfth of the dense model's.
    assert number("extra") == pytest.approx(0.1 / 1.5 / 3 * 12)
    assert number("times_low") <= number("times") <= number("times_high")


def test_break_even_holds_from_there_on() -> None:
    def first(*speeds: float) -> float | None:
        cells = [cell(batch, speed) for batch, speed in zip((1, 8, 32), speeds, strict=True)]
        ((found, measured),) = break_even(table_of(result(*reversed(cells)))).values()
        assert measured == (1, 8, 32)
        return found

    assert first(1.1, 1.2, 1.3) == 1
    assert first(0.9, 1.2, 1.3) == 8
    assert first(1.0, 1.01, 1.3) == 32
    assert first(1.2, 1.01, 1.3) == 32  # what pays at batch 1 alone is no break-even
    assert first(1.2, 1.2, 1.0) is None


def test_break_even_by_dtype_in_words() -> None:
    cells = (cell(1, 1.0), cell(8, 1.4), cell(1, 1.0, dtype="bf16"), cell(8, 1.3, compiled=True))
    lines = closing(table_of(result(*cells)))
    assert lines[1:4] == [
        "  evit on m, fp32: faster than dense from batch 8 on (measured 1, 8)",
        "  evit on m, bf16: not within the batches measured (1)",
        "  evit on m, fp32, compiled: faster than dense from batch 8 on (measured 8)",
    ]


def test_variants_of_one_run_are_compared_in_pairs() -> None:
    found = compare(table_of(result(cell(1, 1.5))), "evit", DENSE)
    assert found.median == pytest.approx(1.5) and found.beyond(0.02) == "faster"
    same = compare(table_of(result(cell(1, 1.01))), "evit", DENSE)
    assert same.beyond(0.02) == "no difference"


def test_other_comparisons_are_refused() -> None:
    both = table_of(result(cell(1, 1.5, run="a"), cell(8, 1.5, run="b")))
    with pytest.raises(ValueError, match="say with run and at which one cell is meant"):
        compare(both, "evit", DENSE)
    assert compare(both, "evit", DENSE, at=8).median == pytest.approx(1.5)
    with pytest.raises(ValueError, match="unknown variant of this run 'tome'"):
        compare(both, "tome", DENSE, at=8)
    with pytest.raises(ValueError, match="the files hold no run in common"):
        list(pairs([table_of(result(cell(1, 1.5, run=run))) for run in "ab"]))
    (sheet,) = pairs([both, table_of(result(cell(8, 1.5, run="b")))])
    assert sheet.title.startswith("m, fp32, batch 8") and sheet.table.empty  # there is one method


def test_the_file_comes_back_the_same(tmp_path: Path) -> None:
    made = table_of(result(cell(1, 1.5), cell(8, 1.2, unfused="no switch", dtype="bf16")))
    made.save(tmp_path / "new" / "r.json")
    again = load(tmp_path / "new" / "r.json")
    pd.testing.assert_frame_equal(again.table, made.table, check_exact=True)
    assert words(again) == words(made) and again.about == made.about
    assert compare(again, "evit", DENSE, at=1) == compare(made, "evit", DENSE, at=1)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["r.csv", "r.json"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("sp*_*.json")), ids=lambda path: path.stem)
def test_committed_results_stay_readable(path: Path) -> None:
    found = load(path)
    assert found.about["commit"] and break_even(found)
    for known in found.about["cells"]:
        sheet = cell_sheet(found, known["setting"], known["batch"])
        shown = list(sheet.table["method"])
        assert set(known["methods"]) < set(shown) and shown[0] == DENSE
    whole = "rounds" in set(found.table["part"])
    if not whole:
        with pytest.raises(ValueError, match="does not hold every round"):
            compare(found, shown[-1], DENSE, run=known["setting"], at=known["batch"])
    assert whole == any(word in path.stem for word in ("amx", "core2", "h100", "spvit"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "not readable JSON"),
        ("[]", "is not what foveate bench writes"),
        ('{"format": 99}', "of a newer version"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(ValueError, match="does not exist; expected what foveate bench wrote"):
        load(tmp_path / "no.json")
    Results(frame([])).save(path)  # a table of something else
    with pytest.raises(ValueError, match="is not what foveate bench writes: it names no cells"):
        load(path)


def test_the_table_says_everything_where_there_is_room() -> None:
    made = table_of(result(cell(1, 1.0), cell(8, 1.5)))
    text = words(made, 160)
    assert "m, fp32, batch 8: 30 rounds of 2 calls, A/A spread 2.0%" in text
    assert "1.500 [1.500, 1.500]  faster" in text and "0.900 [0.900, 0.900]" in text
    for word in ("dense un-fused", "197 > 70-72", "0.65", "0.90", "images/s", "extra", "A/A"):
        assert word in text
    assert "own parameters untrained: evit" in text and "a trial" not in text
    narrow = text_of([cell_sheet(made)], 80)
    assert "extra" not in narrow and "1.500 [1.500, 1.500]" in narrow
    assert max(map(len, narrow.splitlines())) <= 80


def test_goals_are_held_within_the_noise() -> None:
    made = table_of(result(cell(1, 1.5)))
    for goals, said in (
        ({"goal_times": 1.4}, "dense 1.40 reached"),
        ({"goal_times": 1.51}, "dense 1.51 within A/A spread"),
        ({"goal_times": 2.0, "goal_share": 0.8}, "dense 2.00 missed, oracle 0.80 reached"),
    ):
        more = frame(rows("speed", goals, run="m, fp32", at=1, method="evit"))
        held = Results(pd.concat([made.table, more], ignore_index=True), made.about)
        assert cell_sheet(held).table["goal"].iloc[-1] == said and "A goal holds" in words(held)


def test_the_table_says_what_is_missing() -> None:
    made = cell(1, 1.5, unfused="Vit has no switch")
    del made.timings.samples[UNFUSED]
    for samples in made.timings.samples.values():
        del samples[3:]
    whole = result(made)
    whole.left_out["ats"] = "it has a count per image, which is not compiled"
    whole.machine["malloc_tuned"] = False
    text = words(table_of(whole))
    assert "No un-fused model: Vit has no switch" in text
    assert "left out ats: it has a count per image" in text
    assert "malloc was not tuned" in text and "a trial, not a result" in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_written(suffix: str, tmp_path: Path) -> None:
    cells = (cell(1, 0.8), cell(8, 1.5), cell(8, 1.2, dtype="bf16", unfused="none"))
    save(figure(table_of(result(*cells))), tmp_path / "new" / f"x.{suffix}")
    data = (tmp_path / "new" / f"x.{suffix}").read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    with pytest.raises(ValueError, match="nothing was measured"):
        figure(table_of(result()))


# The whole of it ---------------------------------------------------------------------------------


def test_speed_leaves_the_model_alone_and_measures_everything() -> None:
    model = vit(img_size=16, depth=2).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cells: list[int] = []
    told: list[str] = []
    found = bench.speed(
        model,
        ["evit(keep=0.5)", "svit"],
        batches=(1, 3),
        dtypes=("fp32", "bf16"),
        rounds=2,
        sample_ms=0.0,
        quick=True,
        name="small",
        progress=lambda title, done, total: told.append(f"{title} {done}/{total}"),
        finished=lambda so_far: cells.append(len(so_far.cells)),
    )
    assert cells == [1, 2, 3, 4]
    assert told[-1] == "small, bf16, batch 3 5/5"
    assert len({c.run for c in found.cells}) == 4
    for made in found.cells:
        assert {DENSE, AGAIN, UNFUSED, "evit(keep=0.5)", "svit"} < set(made.timings.samples)
        assert set(made.memory) == set(made.timings.samples)
        known = {name: about["parameters"] for name, about in made.methods.items()}
        assert known["svit"] == "untrained, scaled and shifted to their target share"
        assert known["evit(keep=0.5)"] is None and made.methods["evit(keep=0.5)"]["macs"] < 1
    assert "a trial, not a result" in closing(table_of(found))[-1]
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_reduced_model_is_measured_as_it_is() -> None:
    model = foveate.apply(vit(img_size=16, depth=2).eval(), "svit")
    found = bench.speed(
        model, {"mine": "tome(r=1)"}, batches=(2,), rounds=1, sample_ms=0.0, quick=True
    )
    methods = found.cells[0].methods
    assert list(methods) == ["svit(keep=0.7)", "mine"]
    assert methods["svit(keep=0.7)"]["parameters"] == "as saved"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 29}, "a result needs at least 30 rounds, got 29; quick allows fewer"),
        ({"rounds": 0, "quick": True}, "rounds must be at least 1"),
        ({"batches": ()}, "at least one batch"),
        ({"batches": (1, 1)}, "each once"),
        ({"batches": (0,)}, "batches must be whole numbers from 1 on, got 0"),
        ({"dtypes": ("fp8",)}, "dtype must be one of 'fp32'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda"),
        ({"methods": "evit"}, "methods must be a list"),
        ({"methods": ["evit", "evit"]}, "evit is given twice"),
        ({"methods": {"dense": "evit"}}, "'dense' is the name of another variant"),
        ({"methods": ["evti"]}, "did you mean 'evit'"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.speed(vit(img_size=16, depth=2), **{"methods": ["evit"], **options})


def test_another_architecture_is_refused() -> None:
    other = foveate.apply(vit(img_size=16, depth=3), "evit")
    with pytest.raises(ValueError, match="another architecture"):
        bench.speed(vit(img_size=16, depth=2), [other])


def test_a_method_is_explained_next_to_its_oracle() -> None:
    text = bench.explain(vit(img_size=16, depth=2).eval(), "evit", batch=2)
    assert text.startswith("evit against its oracle: fp32, batch 2, cpu")
    assert "aten::addmm" in text and "oracle us" in text
