"""Killed at any batch, a run goes on as if nothing had happened."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from samples import Numbers, evaluation, same, seen, train

from foveate.data import Loader


@pytest.mark.parametrize(
    ("taken", "workers"), [*((n, 0) for n in range(14)), *((n, 2) for n in (0, 4, 6, 9))]
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(taken: int, workers: int) -> None:
    """Killed after any number of batches, of two epochs of six."""

    def stream(loader: Loader) -> Any:
        while True:
            yield from loader

    expected = list(islice(stream(train()), 20))
    killed = train(workers=workers)
    before = list(islice(stream(killed), taken))
    state = killed.state_dict()
    # Workers prepare batches ahead; only those that were handed out count.
    assert state == {"epoch": taken // 6, "batches": taken % 6}
    source = Numbers()
    resumed = train(source, workers=workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(state["epoch"])  # as loops do; it must not go back to the start
    after = list(islice(stream(resumed), 20 - taken))
    assert same(before + after, expected)
    if not workers:  # nothing is read in vain
        assert len(source.read) == 6 * (20 - taken)


def test_a_state_says_where_the_next_batch_is() -> None:
    loader = train()
    states = [loader.state_dict()]
    for _ in loader:
        states.append(loader.state_dict())
    # Exactly at the end it is the start of the next epoch: a resume must not skip all of that.
    assert states == [{"epoch": 0, "batches": n} for n in range(6)] + [{"epoch": 1, "batches": 0}]
    assert loader.state_dict() == {"epoch": 1, "batches": 0} and loader.epoch == 1


def test_the_end_of_an_epoch_that_nobody_asked_beyond() -> None:
    """Loops that know the length do not ask for a batch more."""
    loader, reference = train(), train()
    expected = [list(reference) for _ in range(3)]
    assert same(list(islice(loader, 6)), expected[0])
    loader.set_epoch(1)
    assert same(list(islice(loader, 6)), expected[1])
    assert same(list(islice(loader, 6)), expected[2])


def test_a_state_of_the_whole_epoch_begins_the_next() -> None:
    loader, reference = train(), train()
    loader.load_state_dict({"epoch": 0, "batches": 6})
    assert loader.state_dict() == {"epoch": 1, "batches": 0}
    list(reference)
    assert same(list(loader), list(reference))


def test_an_iteration_that_was_broken_off_is_begun_again() -> None:
    """A look at two validation batches before training must not hide them afterwards."""
    loader = evaluation()
    list(islice(loader, 2))
    assert seen(list(loader)) == list(range(40))
    loader = train()
    expected = list(train())
    list(islice(loader, 2))
    again = iter(loader)
    assert same([next(again)], expected[:1])
    assert loader.state_dict() == {"epoch": 0, "batches": 1}
    assert same(list(again), expected[1:])
    loader.load_state_dict({"epoch": 0, "batches": 4})
    list(islice(loader, 1))
    assert same(list(loader), expected[4:])


def test_going_to_an_epoch() -> None:
    loader, reference = train(), train()
    epochs = [list(reference) for _ in range(3)]
    loader.set_epoch(2)
    assert same(list(loader), epochs[2])
    loader.load_state_dict({"epoch": 1, "batches": 3})
    loader.set_epoch(0)
    assert same(list(loader), epochs[0])
    assert same(list(loader), epochs[1])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1}, r"the state of a loader has epoch and batches, got \['epoch'\]"),
        ({"epoch": 0, "batches": 7}, "says 7 batches were handed out, but an epoch has 6"),
        ({"epoch": -1, "batches": 0}, "epoch must be a whole number from 0, got -1"),
        ({"epoch": 0, "batches": 1.5}, r"batches must be a whole number from 0, got 1\.5"),
    ],
)
def test_states_that_do_not_fit(state: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train().load_state_dict(state)
