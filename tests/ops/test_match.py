"""Pairings between two sets of tokens, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import noise

from foveate.ops import alternate_split, best_partner, hashed, pairwise


@given(st.integers(0, 20), st.booleans())
def test_alternate_split_shares_out_every_position(count: int, first_is_source: bool) -> None:
    positions = list(range(count))
    sources, targets = (positions[part] for part in alternate_split(count, first_is_source))
    assert sorted(sources + targets) == positions
    assert sources == [p for p in positions if (p % 2 == 0) == first_is_source]


def naive(a: list[float], b: list[float], how: str) -> float:
    if how == "cosine":
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return -sum(gaps) if how == "l1" else -math.sqrt(sum(g * g for g in gaps))


@pytest.mark.parametrize("how", ["cosine", "l1", "l2"])
@pytest.mark.parametrize(("sources", "targets"), [(5, 3), (1, 7), (0, 4)])
def test_pairwise_is_the_named_similarity(how: str, sources: int, targets: int) -> None:
    a, b = noise(2, sources, 6), 3 * noise(2, targets, 6, seed=1)
    got = pairwise(a, b, how)
    assert got.shape == (2, sources, targets)
    for image in range(2):
        for i in range(sources):
            for j in range(targets):
                expected = naive(a[image, i].tolist(), b[image, j].tolist(), how)
                assert got[image, i, j].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("how", ["cosine", "l1", "l2"])
def test_a_token_is_most_like_itself(how: str) -> None:
    x = noise(2, 30, 8)
    similarity = pairwise(x, x, how)
    assert torch.equal(best_partner(similarity)[1], torch.arange(30).expand(2, 30))


@pytest.mark.parametrize("how", ["cosine", "l1", "l2"])
def test_zero_tokens_are_compared_without_nan(how: str) -> None:
    x = torch.zeros(1, 3, 4)
    assert torch.isfinite(pairwise(x, x, how)).all()


def test_best_partner_skips_targets_that_are_not_there() -> None:
    similarity = torch.tensor([[[0.9, 0.1, 0.5], [0.2, 0.3, 0.1]]])
    value, target = best_partner(similarity)
    assert target.tolist() == [[0, 1]] and value[0].tolist() == pytest.approx([0.9, 0.3])
    value, target = best_partner(similarity, torch.tensor([[False, True, True]]))
    assert target.tolist() == [[2, 1]] and value[0].tolist() == pytest.approx([0.5, 0.3])


def test_hashed_numbers_look_random_and_repeat() -> None:
    index = torch.arange(20000)
    drawn = hashed(index, 7)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0 and drawn.max() < 1
    share = torch.histc(drawn, 20, 0, 1) / len(index)
    assert (share - 0.05).abs().max() < 0.01
    assert torch.equal(hashed(index.flip(0), 7).flip(0), drawn)  # of the index, not of the place
    assert torch.equal(hashed(index.view(40, 500), 7).flatten(), drawn)
    for other in (hashed(index, 8), drawn[torch.randperm(len(index))]):
        assert abs(torch.corrcoef(torch.stack([drawn, other]))[0, 1].item()) < 0.03
    neighbours = torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]
    assert abs(neighbours.item()) < 0.03
    assert len(drawn[:196].unique()) == 196  # no ties on a grid


@given(st.integers(0, 2**20), st.integers(-(2**70), 2**70))
def test_hashed_takes_any_key(index: int, key: int) -> None:
    value = hashed(torch.tensor([index]), key)
    assert 0 <= value.item() < 1
