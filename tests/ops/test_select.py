"""Top-k and what it leaves over, against lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import complement, top_k

# Few different values, so that ties are common.
rows = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=n, max_size=n),
        min_size=1,
        max_size=4,
    )
)


def listed(idx: Tensor, valid: Tensor | None) -> list[list[int]]:
    """The entries of each row that count."""
    if valid is None:
        return idx.tolist()
    assert idx.shape == valid.shape
    return [row[mask].tolist() for row, mask in zip(idx, valid, strict=True)]


@given(rows, st.data())
def test_top_k_picks_the_largest(scores: list[list[float]], data: st.DataObject) -> None:
    score, count = torch.tensor(scores), len(scores[0])
    one = data.draw(st.integers(0, count))
    each = data.draw(st.lists(st.integers(0, count), min_size=len(scores), max_size=len(scores)))
    for k, wanted in ((one, [one] * len(scores)), (each, each)):
        idx, valid = top_k(score, k)
        assert (valid is None) == isinstance(k, int)
        for row, picked, size in zip(scores, listed(idx, valid), wanted, strict=True):
            assert len(set(picked)) == len(picked) == size
            values = [row[i] for i in picked]
            assert values == sorted(row, reverse=True)[:size]  # whoever of the tied was taken


def test_top_k_leaves_padding_to_the_end() -> None:
    """Padding scored -inf is only picked where nothing else is left."""
    score = torch.tensor([[0.0, float("-inf"), 2.0, 1.0], [float("-inf"), 5.0, 4.0, 6.0]])
    idx, valid = top_k(score, [2, 3])
    assert listed(idx, valid) == [[2, 3], [3, 1, 2]]


def test_top_k_gives_the_same_tokens_to_tied_rows() -> None:
    score = torch.zeros(3, 9)
    idx, _ = top_k(score, 4)
    assert torch.equal(idx[0], idx[1]) and torch.equal(idx[0], idx[2])


@given(rows, st.data())
def test_complement_lists_the_others_in_order(
    scores: list[list[float]], data: st.DataObject
) -> None:
    score = torch.tensor(scores)
    batch, count = score.shape
    k = data.draw(st.integers(0, count))
    idx, _ = top_k(score, k)
    others, none = complement(idx, count)
    assert none is None
    for taken, left in zip(idx.tolist(), others.tolist(), strict=True):
        assert left == [i for i in range(count) if i not in taken]

    cells = st.lists(st.booleans(), min_size=count, max_size=count)
    drawn = data.draw(st.lists(cells, min_size=batch, max_size=batch))
    present = torch.tensor(drawn)
    each = data.draw(st.lists(st.integers(0, k), min_size=batch, max_size=batch))
    valid = torch.arange(k)[None] < torch.tensor(each)[:, None]
    for use_valid, use_present in ((valid, None), (None, present), (valid, present)):
        got = listed(*complement(idx, count, use_valid, use_present))
        taken = listed(idx, use_valid)
        for b in range(batch):
            there = [i for i in range(count) if use_present is None or present[b, i]]
            assert got[b] == [i for i in there if i not in taken[b]]


@pytest.mark.parametrize("k", [0, 5])
def test_complement_of_nothing_and_of_all(k: int) -> None:
    idx = torch.arange(k).expand(2, k)
    others, _ = complement(idx, 5)
    assert others.tolist() == [list(range(k, 5))] * 2
