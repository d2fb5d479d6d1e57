"""Inverse-transform sampling, against a search through every distance."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import noise
from torch import Tensor

from foveate.ops import inverse_transform, nearest


def quantiles(k: int) -> Tensor:
    """The paper's grid, (2i - 1) / 2K."""
    return torch.arange(1, 2 * k, 2, dtype=torch.float64) / (2 * k)


def distances(scores: list[int], k: int, alive: list[bool]) -> list[dict[int, Fraction]]:
    """For every quantile, how far each live token's cumulative score is from it, exactly."""
    weights = [s if here else 0 for s, here in zip(scores, alive, strict=True)]
    if sum(weights) == 0:
        weights = [int(here) for here in alive]
    running, cdf = 0, {}
    for i, (weight, here) in enumerate(zip(weights, alive, strict=True)):
        running += weight
        if here:
            cdf[i] = Fraction(running, sum(weights))
    points = [Fraction(2 * step + 1, 2 * k) for step in range(k)]
    return [{i: abs(value - point) for i, value in cdf.items()} for point in points]


def marked(marks: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in marks]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=15), st.integers(1, 12), st.data())
def test_marks_the_nearest_token_of_every_quantile(
    score: list[int], k: int, data: st.DataObject
) -> None:
    cells = st.lists(st.booleans(), min_size=len(score), max_size=len(score))
    some = data.draw(cells.filter(any))
    for alive in ([True] * len(score), some):
        mask = None if all(alive) else torch.tensor([alive])
        score_row = torch.tensor([score], dtype=torch.float32)
        got = marked(inverse_transform(score_row, quantiles(k), mask))[0]
        table = distances(score, k, alive)
        best = [{i for i, d in row.items() if d == min(row.values())} for row in table]
        assert all(got & nearest_ones for nearest_ones in best)  # every quantile hits
        assert got <= set().union(*best)  # nothing else is hit
        assert len(got) <= k


@pytest.mark.parametrize("count", [1, 2, 7, 196, 777])
def test_uniform_scores_and_as_many_points_keep_everything(count: int) -> None:
    for value in (1.0, 1e-6, 1 / count, 0.0):
        score = torch.full((2, count), value)
        assert inverse_transform(score, quantiles(count)).all()


def test_uniform_scores_under_a_mask_keep_every_live_token() -> None:
    alive = torch.rand(1, 60, generator=torch.Generator().manual_seed(1)) > 0.5
    marks = inverse_transform(torch.full((1, 60), 0.3), quantiles(int(alive.sum())), alive)
    assert torch.equal(marks, alive)


def test_a_dominant_score_keeps_few() -> None:
    score = torch.full((1, 196), 1e-4)
    score[0, 60] = 1.0
    kept = marked(inverse_transform(score, quantiles(196)))[0]
    assert 60 in kept and len(kept) <= 6
    nearly_all = score.clone()
    nearly_all[0, 60] = 1e9
    assert marked(inverse_transform(nearly_all, quantiles(196)))[0] <= {59, 60}


@pytest.mark.parametrize("k", [1, 2, 8, 40, 98])
def test_fewer_points_than_tokens_keep_at_most_k(k: int) -> None:
    score = noise(3, 196).exp()
    counts = inverse_transform(score, quantiles(k)).sum(1)
    assert (counts >= 1).all() and (counts <= k).all()
    if k <= 8:
        assert (counts == k).all()  # distant quantiles hit distinct tokens


def test_padding_and_dead_tokens_are_never_hit_and_change_nothing() -> None:
    score = noise(3, 30).exp()
    alive = torch.rand(3, 30, generator=torch.Generator().manual_seed(2)) > 0.4
    alive[1, :7], alive[2, -9:], alive[0, 0] = False, False, True
    points = quantiles(11)
    marks = inverse_transform(score, points, alive)
    assert not (marks & ~alive).any()
    for b in range(3):
        alone = inverse_transform(score[b, alive[b]][None], points)[0]
        assert torch.equal(marks[b, alive[b]], alone)
    elsewhere = torch.where(alive, score, 1e6)
    assert torch.equal(inverse_transform(elsewhere, points, alive), marks)


def test_a_single_live_token_is_found_wherever_it_stands() -> None:
    for place in range(6):
        alive = torch.arange(6)[None] == place
        for score in (torch.ones(1, 6), torch.zeros(1, 6)):
            assert torch.equal(inverse_transform(score, quantiles(4), alive), alive)


def test_rows_are_independent_of_scale_and_of_each_other() -> None:
    score = noise(4, 50).exp()
    points = quantiles(20)
    together = inverse_transform(score * torch.tensor([[1e-6], [1.0], [1e4], [3.0]]), points)
    for b in range(4):
        assert torch.equal(inverse_transform(score[b : b + 1], points)[0], together[b])


def test_nearest_takes_points_of_each_row_and_the_later_of_two_at_one_distance() -> None:
    cdf = torch.tensor([[0.25, 0.5, 1.0], [0.5, 0.75, 1.0]])
    points = torch.tensor([[0.0, 0.375], [0.8, 1.0]])
    assert marked(nearest(cdf, points)) == [{0, 1}, {1, 2}]
