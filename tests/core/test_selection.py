"""Selection against lists: one list of positions an image, in their order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_tokens import chosen
from torch import Tensor

from foveate.core import Selection

# Few different values, so that ties are common.
SCORES = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=n, max_size=n),
        min_size=1,
        max_size=4,
    )
)


@st.composite
def marks(draw: st.DrawFn, batch: int | None = None, count: int | None = None) -> list[list[bool]]:
    """Which positions of each image are marked."""
    batch = draw(st.integers(1, 4)) if batch is None else batch
    count = draw(st.integers(1, 9)) if count is None else count
    row = st.lists(st.booleans(), min_size=count, max_size=count)
    return draw(st.lists(row, min_size=batch, max_size=batch))


@st.composite
def lists(draw: st.DrawFn, count: int, batch: int = 3, least: int = 0) -> list[list[int]]:
    """Some positions of each image, each once, in any order; often equally many."""
    rows = [draw(st.permutations(range(count))) for _ in range(batch)]
    sizes = draw(st.lists(st.integers(least, count), min_size=batch, max_size=batch))
    if draw(st.integers(0, 2)) == 0:
        sizes = sizes[:1] * batch
    return [row[:n] for row, n in zip(rows, sizes, strict=True)]


def listed(selection: Selection) -> list[list[int]]:
    """The entries of each image that count."""
    if selection.lengths is None:
        return selection.index.tolist()
    assert max(selection.lengths) <= selection.index.shape[1]
    rows = zip(selection.index.tolist(), selection.lengths, strict=True)
    return [row[:n] for row, n in rows]


def ragged(rows: list[list[int]]) -> Selection:
    """The selection with lengths, even where they are all equal."""
    made = chosen(rows)
    return Selection(made.index, tuple(map(len, rows)))


def true_positions(rows: Sequence[Sequence[bool]]) -> list[list[int]]:
    return [[i for i, there in enumerate(row) if there] for row in rows]


# Making one ----------------------------------------------------------------------------------


@given(marks())
def test_checked_takes_entries_from_the_left_and_refuses_holes(rows: list[list[bool]]) -> None:
    index, valid = torch.arange(len(rows[0])).expand(len(rows), -1), torch.tensor(rows)
    holes = [b for b, row in enumerate(rows) if row != sorted(row, reverse=True)]
    if holes:
        with pytest.raises(ValueError, match=f"the selection of image {holes[0]} has a hole"):
            Selection.checked(index, valid)
    else:
        made = Selection.checked(index, valid)
        assert made.index is index and made.lengths == tuple(sum(row) for row in rows)
        assert torch.equal(made.valid, valid)


def test_checked_without_a_mask_counts_every_entry() -> None:
    index = torch.tensor([[2, 0], [1, 1]])
    made = Selection.checked(index)
    assert made.index is index and made.lengths is None and made.valid is None


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (torch.ones(2, 3), r"valid must be bool \[2, 3\].* got torch.float32 \[2, 3\]"),
        (torch.ones(2, 2, dtype=torch.bool), r"bool \[2, 3\] .* got torch.bool \[2, 2\]"),
    ],
)
def test_checked_refuses_a_mask_that_does_not_fit(valid: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection.checked(torch.zeros(2, 3, dtype=torch.long), valid)


@given(SCORES, st.data())
def test_best_picks_the_largest(scores: list[list[float]], data: st.DataObject) -> None:
    score, count = torch.tensor(scores), len(scores[0])
    one = data.draw(st.integers(0, count))
    each = data.draw(st.lists(st.integers(0, count), min_size=len(scores), max_size=len(scores)))
    for k, wanted in ((one, [one] * len(scores)), (each, each)):
        best = Selection.best(score, k)
        assert (best.lengths is None) == isinstance(k, int)
        for row, picked, size in zip(scores, listed(best), wanted, strict=True):
            assert len(set(picked)) == len(picked) == size
            values = [row[i] for i in picked]
            # whoever of the tied was taken
            assert sorted(values, reverse=True) == sorted(row, reverse=True)[:size]


def test_best_leaves_padding_to_the_end() -> None:
    """Padding scored -inf is only picked where nothing else is left."""
    score = torch.tensor([[0.0, float("-inf"), 2.0, 1.0], [float("-inf"), 5.0, 4.0, 6.0]])
    assert listed(Selection.best(score, [2, 3])) == [[2, 3], [3, 1, 2]]


def test_best_gives_the_same_tokens_to_tied_rows() -> None:
    for k in (4, [4] * 3):
        index = Selection.best(torch.zeros(3, 9), k).index
        assert torch.equal(index[0], index[1]) and torch.equal(index[0], index[2])


@given(marks())
def test_where_lists_true_cells_in_order(rows: list[list[bool]]) -> None:
    found = Selection.where(torch.tensor(rows))
    assert listed(found) == true_positions(rows)
    assert found.index.shape[1] == max(map(sum, rows))


@given(st.integers(0, 9).flatmap(lambda n: st.tuples(st.just(n), lists(n), marks(3, n))))
def test_complement_lists_the_others_in_order(
    drawn: tuple[int, list[list[int]], list[list[bool]]],
) -> None:
    count, rows, there = drawn
    taken = chosen(rows)
    others = [[i for i in range(count) if i not in row] for row in rows]
    left = taken.complement(count)
    assert listed(left) == others
    assert (left.lengths is None) == (taken.lengths is None)
    present = torch.tensor(there, dtype=torch.bool).view(3, count)
    here = [[i for i in row if p[i]] for row, p in zip(others, there, strict=True)]
    assert listed(taken.complement(count, present)) == here


@pytest.mark.parametrize("k", [0, 5])
def test_complement_of_nothing_and_of_all(k: int) -> None:
    taken = Selection(torch.arange(k).expand(2, k))
    assert listed(taken.complement(5)) == [list(range(k, 5))] * 2


# Reading and joining -------------------------------------------------------------------------


@given(lists(7), st.integers(0, 3))
def test_reading(rows: list[list[int]], prefix: int) -> None:
    selection, longest = chosen(rows), max(map(len, rows))
    for made in (selection, ragged(rows)):
        assert made.index.shape == (3, longest)
        if made.lengths is None:
            assert made.valid is None and made.size == longest
            assert made.fewer_than([9] * 3) is None
        else:
            counted = [[i < len(row) for i in range(longest)] for row in rows]
            assert made.valid.tolist() == counted
            assert made.size.tolist() == [[len(row)] for row in rows]
            fewer = made.fewer_than([3, 0, 7]).tolist()
            assert fewer == [len(row) < n for row, n in zip(rows, (3, 0, 7), strict=True)]
        assert made.slots(99).tolist() == [row + [99] * (longest - len(row)) for row in rows]
        behind = made.behind(prefix)
        assert (behind.lengths is None) == (made.lengths is None)
        front = list(range(prefix))
        assert listed(behind) == [front + [i + prefix for i in row] for row in rows]


@given(lists(5), lists(5))
def test_then_puts_one_selection_behind_the_other(
    rows: list[list[int]], others: list[list[int]]
) -> None:
    expected = [row + other for row, other in zip(rows, others, strict=True)]
    for first in (chosen(rows), ragged(rows)):
        for second in (chosen(others), ragged(others)):
            assert listed(first.then(second)) == expected


@given(lists(6, least=1), st.data())
def test_of_selects_among_positions(rows: list[list[int]], data: st.DataObject) -> None:
    named = [data.draw(st.permutations(range(20, 26))) for _ in rows]
    for made in (chosen(rows), ragged(rows)):
        found = made.of(torch.tensor(named))
        assert listed(found) == [[n[i] for i in row] for n, row in zip(named, rows, strict=True)]
        assert found.lengths == made.lengths
