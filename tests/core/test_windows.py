"""Attention in windows against the model's own blocks with a mask, and who may not run in them."""

from __future__ import annotations

import pytest
import torch
from small import close, eva, images, keep_masks, noise, randomise, vit
from torch import Tensor, nn

import foveate
from foveate.backbones import backbone_for
from foveate.core import Windows, dense


def windowed(model: nn.Module, size: int, every: int = 2) -> nn.Module:
    return dense(backbone_for(model), Windows(size, every))


def may_see(grid: tuple[int, int], size: int, prefix: int) -> Tensor:
    """Which token sees which: those of its window and the prefix; the prefix sees all."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    window = ((rows // size) * 1000 + columns // size).flatten()
    seen = torch.ones(prefix + len(window), prefix + len(window), dtype=torch.bool)
    seen[prefix:, prefix:] = window[:, None] == window
    return seen


@pytest.mark.parametrize("size", [2, 4, 6, 9])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@torch.no_grad()
def test_equals_masked_attention(size: int, prefix: int) -> None:
    """Windows of 4 on a grid of 6 x 7 leave ragged ones at both borders."""
    options: dict = {
        0: dict(class_token=False, global_pool="avg"),
        1: {},
        5: dict(reg_tokens=4, no_embed_class=True),
    }[prefix]
    model = randomise(vit(**options)).eval()
    x = noise(2, 3, 48, 56)
    driven = windowed(model, size)
    state = driven.begin(x)
    wanted, seen = state.tokens(), may_see((6, 7), size, prefix)
    for block in range(4):
        state = driven.step(block, state)
        wanted = model.blocks[block](wanted, None if block % 2 else seen)
        close(state.tokens(), wanted, 1e-5)


@torch.no_grad()
def test_images_of_different_sizes_each_have_their_own_windows() -> None:
    model = windowed(randomise(eva(use_rot_pos_emb=True, attn_type="rope")).eval(), 4)
    batch = [noise(3, 48, 48), noise(3, 32, 56, seed=1), noise(3, 40, 16, seed=2)]
    state = model.tokens(batch)
    rows = state.x.split(state.layout.lengths)
    for own, image in zip(rows, batch, strict=True):
        close(own, model.tokens(image[None]).x, 1e-5)


def test_trains() -> None:
    model = windowed(vit(), 4).train()
    model(images(2)).sum().backward()
    assert model.vit.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_every_so_many_th_block_is_global() -> None:
    windows = Windows(14, every=3)
    windows.build(12)
    assert windows.global_blocks == {2, 5, 8, 11}
    chosen = Windows(14, global_blocks=(1,))
    with pytest.raises(ValueError, match=r"global_blocks must lie in 0..0, got 1"):
        chosen.build(1)
    with pytest.raises(ValueError, match="size of the windows must be at least 1, got 0"):
        Windows(0)


def test_refusals_name_the_method() -> None:
    model = windowed(vit(), 4)
    with pytest.raises(ValueError, match="windows need whole images: a keep_mask leaves gaps"):
        model(images(2), keep_masks(2, (6, 6)))
    reduced = foveate.apply(vit(), "evit", check=False)
    reduced.windows = Windows(4)
    with pytest.raises(ValueError, match="evit cannot run in windows"):
        reduced(images(1))
