"""What becomes of the tokens that a method does not keep."""

from __future__ import annotations

import pytest
import torch
from naive_tokens import Naive, beginning, padded
from small import noise
from torch import Tensor

from foveate.core import Selection, TokenState, disposal
from foveate.ops import pairwise

LAYOUTS = pytest.mark.parametrize("counts", [None, [8, 3, 5], [2, 8, 1]], ids=str)


def start(counts: list[int] | None) -> tuple[TokenState, Naive, list[list[int]], Tensor]:
    """A state, its twin, tokens to keep (in no order) and weights; padding weighs nothing."""
    state, naive = beginning(counts, prefix=1)
    rows = [[n - 1, 0][: max(1, n - 1)] for n in state.counts]
    weight = noise(3, max(state.counts), seed=2).exp()
    present = state.present()
    return state, naive, rows, weight if present is None else weight * present


def select(rows: list[list[int]], counts: list[int] | None) -> Selection:
    """With lengths where the layout is ragged, as methods make them."""
    return Selection(padded(rows), None if counts is None else tuple(map(len, rows)))


@LAYOUTS
def test_drop_keeps_the_selection(counts: list[int] | None) -> None:
    state, naive, rows, weight = start(counts)
    naive.keep(rows)
    naive.check(disposal.drop(state, select(rows, counts), weight))


@LAYOUTS
def test_fuse_appends_the_weighted_sum_of_the_rest(counts: list[int] | None) -> None:
    state, naive, rows, weight = start(counts)
    some = [len(row) < n for row, n in zip(rows, state.counts, strict=True)]
    assert all(some) == (counts != [2, 8, 1])  # an image that drops nothing has nothing to fuse
    naive.fuse(rows, weight, some)
    after = disposal.fuse(state, select(rows, counts), weight)
    naive.check(after)
    assert after.layout.is_even == (counts is None)


@LAYOUTS
def test_the_fused_mean_divides_by_the_weights_of_the_rest(counts: list[int] | None) -> None:
    state, _, rows, weight = start(counts)
    got = disposal.fused(state, select(rows, counts), weight, mean=True)
    for b, n in enumerate(state.counts):
        rest = [i for i in range(n) if i not in rows[b]]
        tokens, w = state.tokens()[b, 1:][rest], weight[b, rest]
        expected = (w[:, None] * tokens).sum(0) / w.sum() if rest else torch.zeros(4)
        torch.testing.assert_close(got[b], expected)


def test_what_is_fused_passes_gradients_to_the_weights_of_the_rest() -> None:
    state, _, rows, weight = start(None)
    weight.requires_grad_()
    disposal.fused(state, select(rows, None), weight).sum().backward()
    kept = torch.zeros(3, 8, dtype=torch.bool)
    kept[:, [7, 0]] = True
    assert (weight.grad[kept] == 0).all() and (weight.grad[~kept] != 0).all()


@LAYOUTS
@pytest.mark.parametrize("how", ["cosine", "given"])
def test_merge_averages_each_into_the_kept_token_it_resembles_most(
    counts: list[int] | None, how: str
) -> None:
    state, naive, rows, weight = start(counts)
    others = [
        [i for i in range(n) if i not in row] for row, n in zip(rows, state.counts, strict=True)
    ]
    table = pairwise(state.tokens()[:, 1:], state.tokens()[:, 1:], "cosine")
    if how == "given":
        table = noise(3, 8, 8, seed=5)[:, : table.shape[1], : table.shape[2]]
    into = [
        [max(range(len(row)), key=lambda slot: table[b, i, row[slot]]) for i in left]
        for b, (row, left) in enumerate(zip(rows, others, strict=True))
    ]
    assert {slot for image in into for slot in image} == {0, 1}
    naive.merge(rows, others, into, weight, False)
    image = torch.arange(3)[:, None, None]

    def similarity(merged: Selection, kept: Selection) -> Tensor:
        assert merged.index.shape == padded(others).shape
        return table[image, merged.index[:, :, None], kept.index[:, None, :]]

    given = similarity if how == "given" else None
    naive.check(disposal.merge(state, select(rows, counts), weight, given))


@LAYOUTS
def test_park_sets_the_rest_aside(counts: list[int] | None) -> None:
    state, naive, rows, weight = start(counts)
    naive.park([[0] + [i + 1 for i in row] for row in rows])
    inner = disposal.park(state, select(rows, counts), weight)
    naive.check(inner)
    assert torch.equal(inner.recall().x, state.x)


@LAYOUTS
def test_tokens_of_a_selection(counts: list[int] | None) -> None:
    state, _, rows, _ = start(counts)
    laid = disposal.tokens_of(state, select(rows, counts))
    assert laid.shape == (3, max(map(len, rows)), 4)
    for b, row in enumerate(rows):
        assert torch.equal(laid[b, : len(row)], state.tokens()[b, 1:][row])
