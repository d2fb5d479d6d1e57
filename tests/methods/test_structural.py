"""Structural: average pooling of the grid, whatever its shape and whatever is missing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import built, images, keep_masks, noise, randomise, vit
from torch import Tensor

import foveate
from foveate.core import Context, ReducedViT, Selection, TokenState


def structural(method: str = "structural(after_block=1)", **options: object) -> ReducedViT:
    return foveate.apply(randomise(vit(**options)).eval(), method).eval()


def dense(model: ReducedViT, x: Tensor) -> Tensor:
    """Patches after block 1 of the untouched model, ``[B, C, H, W]``."""
    nothing = foveate.apply(model.vit, "random(keep=1.0)").eval()
    with torch.no_grad():
        return nothing.forward_intermediates(x, [1], intermediates_only=True)[0]


@pytest.mark.parametrize("size", [(48, 48), (24, 56), (40, 48), (8, 40), (8, 8)], ids=str)
def test_cells_are_means_also_at_the_edges_of_odd_grids(size: tuple[int, int]) -> None:
    model, x = structural(), images(2, size)
    left = model.trace(x).blocks[1].output
    pooled = F.avg_pool2d(dense(model, x), 2, ceil_mode=True, count_include_pad=False)
    rows, columns = pooled.shape[2:]
    assert left.counts == (rows * columns,) * 2
    torch.testing.assert_close(left.tokens()[:, 1:], pooled.flatten(2).transpose(1, 2))
    nearest = F.interpolate(pooled, scale_factor=2)[..., : size[0] // 8, : size[1] // 8]
    torch.testing.assert_close(left.restore(), nearest.flatten(2).transpose(1, 2))
    assert left.layout.rect(left.size)[:, 1:].sum(1).tolist() == [size[0] * size[1] / 64] * 2


@pytest.mark.parametrize("size", [(48, 48), (24, 56)], ids=str)
def test_under_a_keep_mask_cells_are_means_of_what_is_there(size: tuple[int, int]) -> None:
    model, x, grid = structural(), images(3, size), (size[0] // 8, size[1] // 8)
    mask = keep_masks(3, grid, share=0.4)
    trace = model.trace(x, keep_mask=mask)
    before, left = trace.blocks[1].mlp, trace.blocks[1].output
    nothing = foveate.apply(model.vit, "random(keep=1.0)").eval()
    values = nothing.trace(x, keep_mask=mask).blocks[1].output.restore("zero")
    values = values.transpose(1, 2).unflatten(2, grid)
    pool = dict(kernel_size=2, ceil_mode=True, count_include_pad=False)
    share = F.avg_pool2d(mask[:, None].float(), **pool)
    means = (F.avg_pool2d(values, **pool) / share.clamp_min(1e-9)).flatten(2).transpose(1, 2)
    occupied = share.flatten(1) > 0
    assert left.counts == tuple(occupied.sum(1).tolist())
    for b in range(3):
        got = left.tokens()[b, 1 : left.layout.lengths[b]]
        torch.testing.assert_close(got, means[b, occupied[b]], atol=1e-5, rtol=1e-4)
        assert torch.equal(left.source[b] >= 0, mask[b].flatten())
    assert before.size is None and left.size.sum() == mask.sum() + 3


def test_after_a_method_that_reorders_the_grid() -> None:
    """Cells are found by place, not by position."""
    alone = structural("structural(after_block=2)")
    chain = structural("evit(keep=0.5, rest='drop', blocks=[1]) + structural(after_block=2)")
    trace = chain.trace(images())
    before, left = trace.blocks[2].mlp, trace.blocks[2].output
    cells = alone.trace(images()).blocks[2].output.source  # same cell, same token
    for b in range(3):
        there = before.source[b] >= 0
        assert torch.equal(left.source[b] >= 0, there)
        for cell in cells[b].unique().tolist():
            group = (cells[b] == cell) & there
            assert len(left.source[b, group].unique()) <= 1
        assert left.counts[b] == len(cells[b, there].unique())


def test_a_whole_grid_in_another_order() -> None:
    """Nothing is missing, but every image has its own order: cells are the same."""
    x = noise(3, 2 + 15, 4)
    state = TokenState.begin(x, Context(2, (3, 5)), place=True, track=True)
    order = noise(3, 15, seed=1).argsort(1)
    method = built("structural(after_block=1)", prefix=2, grid=(3, 5))
    plain, other = method.after(1, state), method.after(1, state.keep(Selection(order)))
    torch.testing.assert_close(other.x, plain.x)
    assert torch.equal(other.source, plain.source)
    assert other.layout.is_even and torch.equal(other.size, plain.size)


def test_tokens_without_a_place_stay_behind_the_cells() -> None:
    chain = structural("evit(keep=0.5, blocks=[1]) + structural(after_block=2)")
    trace = chain.trace(images())
    fed, left = trace.blocks[2].mlp, trace.blocks[2].output
    fused = fed.layout.rect(fed.place)[:, -1]
    assert fused.tolist() == [36] * 3
    for b in range(3):
        last = left.layout.lengths[b] - 1
        assert left.layout.rect(left.place, -1)[b, last] == 36


@pytest.mark.parametrize("block", [-1, 4, True, 1.0])
def test_refusals(block: object) -> None:
    with pytest.raises(ValueError, match=r"after_block must .*, got"):
        structural(f"structural(after_block={block!r})")


def test_the_default_is_half_of_the_depth() -> None:
    assert structural("structural").reducer.active_blocks == (1,)
    assert structural("structural(after_block=0)").trace(images()).counts()[1] == (10,) * 3
    assert structural("structural", depth=1).reducer.active_blocks == (0,)
