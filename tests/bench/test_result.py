"""Results: what may be compared, from which batch on it pays, JSON, tables, the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import vit

import foveate
from foveate import bench
from foveate.bench import Cell, Result, Timings, compare, compare_all
from foveate.bench.result import cell_of
from foveate.bench.timing import AGAIN, DENSE, UNFUSED

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
            "parked_blocks": [],
        },
        "macs": 0.65,
        "acting_blocks": 3,
        "depth": 12,
        "parameters": "untrained",
    }
    settings: dict = dict(model="m", dtype="fp32", compiled=False, unfused=None)
    memory = {key: 1000 for key in samples} | {name: 900}
    return cell_of(
        **{**settings, **options},
        batch=batch,
        run=run,
        timings=Timings(samples, 2),
        facts={name: facts},
        memory=memory,
    )


def result(*cells: Cell) -> Result:
    machine = {"torch": "t", "timm": "t", "python": "p", "cpu": "c", "threads": 1, "device": "cpu"}
    return Result("what", "foveate bench", None, machine, {"images": "made"}, list(cells))


def test_a_cell_says_what_its_samples_say() -> None:
    made = cell(8, 1.5)
    row = made.row("evit")
    assert row.over_dense.median == pytest.approx(1.5)
    assert row.share.median == pytest.approx(0.9)
    assert row.oracle_over_dense.median == pytest.approx(1.5 / 0.9)
    assert made.unfused.median == pytest.approx(0.8)  # type: ignore[union-attr]
    assert made.spread == pytest.approx(0.02, abs=1e-3)
    assert made.peak("evit") == 0.9
    with pytest.raises(ValueError, match="did you mean 'evit'"):
        made.row("evti")


def test_break_even_holds_from_there_on() -> None:
    def first(*speeds: float) -> int | None:
        cells = [cell(batch, speed) for batch, speed in zip((1, 8, 32), speeds, strict=True)]
        (found,) = result(*reversed(cells)).break_even()
        return found.batch

    assert first(1.1, 1.2, 1.3) == 1
    assert first(0.9, 1.2, 1.3) == 8
    assert first(1.0, 1.01, 1.3) == 32
    assert first(1.2, 1.01, 1.3) == 32  # what pays at batch 1 alone is no break-even
    assert first(1.2, 1.2, 1.0) is None


def test_break_even_by_dtype_in_words() -> None:
    found = result(
        cell(1, 1.0), cell(8, 1.4), cell(1, 1.0, dtype="bf16"), cell(8, 1.3, compiled=True)
    ).break_even()
    assert [str(line) for line in found] == [
        "evit, fp32: faster than dense from batch 8 on (measured 1, 8)",
        "evit, bf16: not within the batches measured (1)",
        "evit, fp32, compiled: faster than dense from batch 8 on (measured 8)",
    ]


def test_variants_of_one_run_are_compared_in_pairs() -> None:
    found = result(cell(1, 1.5)).compare("evit", DENSE)
    assert found.verdict == "faster" and found.ratio.median == pytest.approx(1.5)
    assert str(found).startswith("evit is faster than dense: 1.500 [1.500, 1.500] times as fast")
    same = result(cell(1, 1.01)).compare("evit", DENSE)
    assert str(same).startswith("no difference measured between evit and dense: 1.010")


def test_other_comparisons_are_refused() -> None:
    both = result(cell(1, 1.5, run="a"), cell(8, 1.5, run="b"))
    with pytest.raises(ValueError, match="in different runs, and what was not interleaved cannot"):
        compare(both.cells[0].variant("evit"), both.cells[1].variant("evit"))
    with pytest.raises(ValueError, match="say with batch and dtype"):
        both.compare("evit", DENSE)
    assert both.compare("evit", DENSE, batch=8).verdict == "faster"
    with pytest.raises(ValueError, match="unknown variant of this run 'tome'"):
        both.compare("tome", DENSE, batch=8)
    with pytest.raises(ValueError, match="the files hold no run in common"):
        list(compare_all([result(cell(1, 1.5, run="a")), result(cell(1, 1.2, run="b"))]))
    ((found, pairs),) = compare_all([both, result(cell(8, 1.5, run="b"))])
    assert found.run == "b" and pairs == []


def test_json_comes_back_the_same(tmp_path: Path) -> None:
    made = result(cell(1, 1.5), cell(8, 1.2, unfused="no switch", dtype="bf16"))
    made.left_out["ats"] = "why"
    made.cells[0].rows[0].bars = [{"of": "dense", "value": 1.5, "goal": 1.2, "verdict": "reached"}]
    made.save(tmp_path / "new" / "r.json")
    again = Result.load(tmp_path / "new" / "r.json")
    assert again.as_json() == made.as_json()
    found, before = (r.compare("evit", DENSE, batch=1) for r in (again, made))
    assert found.ratio == before.ratio and found.verdict == before.verdict
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("speed_*.json")), ids=lambda path: path.stem)
def test_committed_results_stay_readable(path: Path) -> None:
    found = Result.load(path)
    text = found.table()
    for one in found.cells:
        assert str(one) in text and all(row.method in text for row in one.rows)
    assert found.break_even()
    if json.loads(path.read_text()).get("format") is None:
        with pytest.raises(ValueError, match="does not hold every round"):
            list(compare_all([found]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "not what foveate bench writes"),
        ('{"what": 1}', "not what foveate bench writes: see 'command'"),
        ('{"format": 99}', "of a newer version"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Result.load(path)
    with pytest.raises(ValueError, match="does not exist"):
        Result.load(tmp_path / "no.json")


def test_the_table_says_everything_where_there_is_room() -> None:
    made = result(cell(1, 1.0), cell(8, 1.5))
    text = made.table(width=160)
    assert "m, fp32, batch 8, eager: 30 rounds of 2 calls, A/A spread 2.0%" in text
    assert "1.500 [1.500, 1.500]  faster  0.900 [0.900, 0.900]" in text
    for words in ("dense un-fused", "197 > 70-72", "0.65", "0.90", "images/s", "extra", "A/A"):
        assert words in text
    assert "evit, fp32: faster than dense from batch 8 on" in text
    assert "own parameters untrained: evit" in text and "a trial" not in text
    narrow = made.table(width=90)
    assert "extra " not in narrow.split("From which")[0] and "1.500 [1.500, 1.500]" in narrow
    assert max(map(len, narrow.splitlines())) <= 90


def test_the_table_says_what_is_missing() -> None:
    made = result(cell(1, 1.5, unfused=None))
    del made.cells[0].variants[UNFUSED]
    made.cells[0].unfused, made.cells[0].rounds = "Vit has no switch", 3
    made.left_out["ats"] = "it has a count per image, which is not compiled"
    made.machine["malloc_tuned"] = False
    text = made.table()
    assert "no un-fused model: Vit has no switch" in text
    assert "left out ats: it has a count per image" in text
    assert "malloc was not tuned" in text and "a trial, not a result" in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_written(suffix: str, tmp_path: Path) -> None:
    made = result(cell(1, 0.8), cell(8, 1.5), cell(8, 1.2, dtype="bf16", unfused="none"))
    made.plot(tmp_path / "new" / f"x.{suffix}")
    data = (tmp_path / "new" / f"x.{suffix}").read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    with pytest.raises(ValueError, match="nothing was measured"):
        result().plot(tmp_path / "x.png")


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
    assert cells == [1, 2, 3, 4] and found.trial
    assert told[-1] == "small, bf16, batch 3 5/5"
    assert len({c.run for c in found.cells}) == 4
    for one in found.cells:
        assert {DENSE, AGAIN, UNFUSED, "evit(keep=0.5)", "svit"} < set(one.variants)
        assert set(one.memory or ()) == set(one.samples or ()) == set(one.variants)
        assert one.row("svit").parameters == "untrained, scaled and shifted to their target share"
        assert one.row("evit(keep=0.5)").parameters is None
        assert one.row("evit(keep=0.5)").macs < 1  # type: ignore[operator]
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_reduced_model_is_measured_as_it_is() -> None:
    model = foveate.apply(vit(img_size=16, depth=2).eval(), "svit")
    found = bench.speed(
        model, {"mine": "tome(r=1)"}, batches=(2,), rounds=1, sample_ms=0.0, quick=True
    )
    assert found.methods == ["svit(keep=0.7)", "mine"]
    assert found.cells[0].row("svit(keep=0.7)").parameters == "as saved"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 29}, "a result needs at least 30 rounds, got 29; quick allows fewer"),
        ({"rounds": 0, "quick": True}, "rounds must be at least 1"),
        ({"batches": ()}, "at least one batch"),
        ({"batches": (1, 1)}, "each once"),
        ({"batches": (0,)}, "batches must be whole numbers from 1 on, got 0"),
        ({"dtypes": ("fp8",)}, "dtype must be one of 'fp32'"),
        ({"device": "tpu"}, "device must be one of 'cpu', 'cuda'"),
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
