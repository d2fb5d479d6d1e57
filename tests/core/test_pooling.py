"""Pooling against loops: sizes, live tokens, ragged layouts, tokens that stand for no patch."""

from __future__ import annotations

import pytest
import torch
from naive_tokens import beginning
from small import noise
from torch import Tensor

from foveate.core import Context, Layout, TokenState, pool_mask, pool_tokens

HOW = pytest.mark.parametrize("how", ["avg", "max", "avgmax"])
PREFIX = pytest.mark.parametrize("include_prefix", [False, True])


def expected(images: list[Tensor], weights: list[Tensor], how: str, skip: int) -> Tensor:
    """Weighted mean and maximum over tokens of positive weight."""
    pooled = []
    for x, weight in zip(images, weights, strict=True):
        x, weight = x[skip:].double(), weight[skip:].double()
        mean = (x * weight[:, None]).sum(0) / weight.sum()
        best = x[weight > 0].amax(0)
        pooled.append({"avg": mean, "max": best, "avgmax": (mean + best) / 2}[how])
    return torch.stack(pooled).float()


def images_of(state: TokenState) -> list[Tensor]:
    return list(state.x.split(list(state.layout.lengths)))


def check(state: TokenState, weights: Tensor, how: str, include_prefix: bool) -> None:
    parts = list(weights.split(list(state.layout.lengths)))
    skip = 0 if include_prefix else state.prefix
    want = expected(images_of(state), parts, how, skip)
    torch.testing.assert_close(pool_tokens(state, how, include_prefix), want)


@HOW
@PREFIX
@pytest.mark.parametrize("counts", [None, [8, 1, 5]], ids=str)
def test_plain(counts: list[int] | None, how: str, include_prefix: bool) -> None:
    state, _ = beginning(counts, prefix=2)
    check(state, torch.ones(state.layout.total), how, include_prefix)
    bare = state.replace(place=None, source=None, canvas=None)
    check(bare, torch.ones(state.layout.total), how, include_prefix)


@HOW
@PREFIX
@pytest.mark.parametrize("counts", [None, [8, 2, 5]], ids=str)
def test_merged_tokens_weigh_as_many_patches_as_they_are(
    counts: list[int] | None, how: str, include_prefix: bool
) -> None:
    state, _ = beginning(counts, prefix=2)
    size = torch.randint(1, 9, (state.layout.total,), generator=torch.Generator().manual_seed(0))
    check(state.replace(size=size.float()), size.float(), how, include_prefix)


@HOW
@PREFIX
@pytest.mark.parametrize("counts", [None, [8, 2, 5]], ids=str)
def test_fused_tokens_do_not_count(
    counts: list[int] | None, how: str, include_prefix: bool
) -> None:
    state, _ = beginning(counts, prefix=2)
    longer = state.append(1000 + noise(3, 4))
    want = pool_tokens(state, how, include_prefix)
    torch.testing.assert_close(pool_tokens(longer, how, include_prefix), want)
    sized = longer.replace(size=torch.ones(longer.layout.total))
    torch.testing.assert_close(pool_tokens(sized, how, include_prefix), want)


@HOW
@PREFIX
def test_dead_tokens_do_not_count(how: str, include_prefix: bool) -> None:
    state, _ = beginning(None, prefix=2)
    alive = (noise(3, 10, seed=3) > 0).float()
    alive[:, :2] = 1
    alive[:, 4] = 1
    check(state.replace(alive=alive), alive.flatten(), how, include_prefix)


def test_gates_get_gradient_through_the_mean() -> None:
    state, _ = beginning(None, prefix=1)
    alive = torch.ones(3, 9)
    alive[:, 5:] = 0
    alive.requires_grad_()
    pool_tokens(state.replace(alive=alive), "avg").square().sum().backward()
    assert (alive.grad[:, 1:] != 0).all() and (alive.grad[:, 0] == 0).all()


@HOW
def test_an_image_with_nothing_to_pool_gives_zeros(how: str) -> None:
    state, _ = beginning([0, 8, 3], prefix=1)
    pooled = pool_tokens(state, how)
    assert (pooled[0] == 0).all() and torch.isfinite(pooled).all()
    even, _ = beginning(None, prefix=1)
    alive = torch.ones(3, 9)
    alive[2, 1:] = 0
    pooled = pool_tokens(even.replace(alive=alive), how)
    assert (pooled[2] == 0).all() and (pooled[:2] != 0).all()


@HOW
def test_a_single_image_with_nothing_to_pool_gives_zeros(how: str) -> None:
    """One image alone is even, whatever it holds."""
    state = TokenState(noise(1, 4), Layout.ragged([1]), Context(1, (2, 4)))
    assert torch.equal(pool_tokens(state, how), torch.zeros(1, 4))


def test_the_dtype_stays() -> None:
    state, _ = beginning([8, 2, 5], prefix=1)
    state = state.replace(x=state.x.bfloat16(), size=torch.ones(state.layout.total))
    for how in ("avg", "max", "avgmax"):
        assert pool_tokens(state, how).dtype == torch.bfloat16


def test_mask_of_attention_pooling() -> None:
    state, _ = beginning(None, prefix=1)
    assert pool_mask(state.replace(place=None)) is None
    longer = state.append(noise(3, 4))
    assert pool_mask(longer).shape == (3, 1, 1, 10)
    assert pool_mask(longer)[:, 0, 0].tolist() == [[True] * 9 + [False]] * 3
    ragged, _ = beginning([8, 1, 5], prefix=1)
    valid = [[i <= n for i in range(9)] for n in (8, 1, 5)]
    assert pool_mask(ragged)[:, 0, 0].tolist() == valid
    alive = torch.ones(3, 9)
    alive[1, 4] = 0
    masked = pool_mask(state.replace(alive=alive))[:, 0, 0]
    assert torch.equal(masked, alive > 0)
    sized = pool_mask(longer.replace(size=torch.zeros(30)))  # sizes weigh a mean, no more
    assert torch.equal(sized, pool_mask(longer))
