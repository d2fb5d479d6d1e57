"""Interleaving and statistics, against samples made by hand."""

from __future__ import annotations

import math

import pytest

from foveate.bench import Interval, Timings, measure, median_of


def test_every_round_has_every_variant_once_in_an_order_of_its_own() -> None:
    ran: list[str] = []
    names = "abcdef"
    calls = {name: (lambda n=name: ran.append(n)) for name in names}
    seen: list[tuple[int, int]] = []
    timings = measure(
        calls,
        rounds=12,
        warmup=2,
        sample_ms=0.0,
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert timings.repeats == 1
    assert all(len(samples) == 12 for samples in timings.samples.values())
    rounds = ran[3 * len(names) :]  # after the calls that find out how long one takes
    orders = [tuple(rounds[i : i + 6]) for i in range(0, len(rounds), 6)]
    assert len(orders) == 14 and all(sorted(order) == sorted(names) for order in orders)
    assert len(set(orders)) > 7  # of 720 that there are
    assert {order[0] for order in orders} > {"a"}
    assert seen == [(done, 14) for done in range(1, 15)]


def test_the_seed_settles_the_order() -> None:
    def order(seed: int) -> list[str]:
        ran: list[str] = []
        calls = {name: (lambda n=name: ran.append(n)) for name in "abcd"}
        measure(calls, rounds=5, warmup=0, sample_ms=0.0, device="cpu", seed=seed)
        return ran

    assert order(1) == order(1) != order(2)


def test_median_with_order_statistics() -> None:
    found = median_of(list(range(30, 0, -1)))
    # Of 30 values the 10th and the 21st cover the median with 95.7 %.
    assert (found.median, found.low, found.high) == (15.5, 10, 21)
    outside = 2 * sum(math.comb(30, i) for i in range(10)) / 2**30
    assert found.level == pytest.approx(1 - outside) and found.level > 0.95


def test_few_values_give_their_range() -> None:
    found = median_of([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.level) == (2.0, 1.0, 3.0, 0.75)


def test_ratios_are_paired() -> None:
    # Rounds differ a hundredfold, and b takes half of a's time in each of them.
    a = [1.0, 100.0, 3.0, 50.0, 7.0, 20.0, 2.0, 9.0]
    timings = Timings({"a": a, "b": [x / 2 for x in a]}, 1)
    ratio = timings.ratio("b", "a")
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    assert timings.extra_ms("a", "b") == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 1.2, "faster"),
        (1.05, 1.2, "no difference"),  # touches the spread
        (1.01, 1.04, "no difference"),  # inside it
        (0.9, 1.2, "no difference"),
        (0.8, 0.94, "slower"),
        (0.8, 0.95, "no difference"),
    ],
)
def test_only_what_lies_beyond_the_spread_differs(low: float, high: float, verdict: str) -> None:
    assert Interval((low + high) / 2, low, high, 0.95).beyond(0.05) == verdict


def test_a_runtime_wakes_up_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``settle``: a rest, and a call that does not count, before each sample."""
    rests: list[float] = []
    monkeypatch.setattr("foveate.timing.time.sleep", rests.append)
    called = []
    options = {"rounds": 4, "warmup": 0, "sample_ms": 0.0, "device": "cpu"}
    found = measure({"it": lambda: called.append(1)}, **options, settle=True)
    assert len(rests) == 4 and rests[0] > 0
    assert len(called) == 3 + 4 * 2  # three tell how long a call takes
    assert len(found.samples["it"]) == 4
