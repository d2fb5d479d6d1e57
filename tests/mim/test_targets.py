"""Images as patches and back, and patches that are normalised one by one."""

from __future__ import annotations

import pytest
import torch
from small import noise

from foveate.mim.targets import gathered, normalised, patchify, statistics, unpatchify


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((2, 3, 8, 12), (4, 4)),
        ((1, 1, 28, 28), (7, 7)),
        ((3, 2, 6, 8), (3, 2)),
        ((2, 4, 4, 4), (1, 1)),
    ],
)
def test_there_and_back(shape: tuple[int, ...], patch: tuple[int, int]) -> None:
    x = noise(*shape)
    grid = (shape[2] // patch[0], shape[3] // patch[1])
    cut = patchify(x, patch)
    assert cut.shape == (shape[0], grid[0] * grid[1], patch[0] * patch[1] * shape[1])
    assert torch.equal(unpatchify(cut, grid, patch), x)


def test_patches_in_raster_order_with_row_column_channel_in_each() -> None:
    x = noise(2, 3, 6, 8)
    cut = patchify(x, (3, 2))
    for patch in range(8):
        row, column = divmod(patch, 4)
        for value in range(18):
            down, across, channel = value // 6, value // 3 % 2, value % 3
            wanted = x[:, channel, 3 * row + down, 2 * column + across]
            assert torch.equal(cut[:, patch, value], wanted)


def test_normalised_patches_have_mean_0_and_unbiased_variance_1() -> None:
    cut = 5 * noise(2, 9, 48) + noise(2, 9, 1, seed=1)
    found = normalised(cut).double()
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 9).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.var(-1), torch.ones(2, 9).double(), atol=1e-5, rtol=0)
    mean, spread = statistics(cut)
    torch.testing.assert_close(normalised(cut) * spread + mean, cut, atol=1e-5, rtol=0)


def test_a_patch_of_one_colour_stays_finite() -> None:
    cut = torch.full((1, 2, 16), 0.7, requires_grad=True)
    found = normalised(cut)
    assert found.abs().max() < 1e-3
    found.sum().backward()
    assert cut.grad is not None and cut.grad.isfinite().all()


def test_gathered_takes_rows() -> None:
    tokens, index = noise(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    found = gathered(tokens, index)
    assert torch.equal(found[0], tokens[0, [4, 0]]) and torch.equal(found[1], tokens[1, [1, 1]])
