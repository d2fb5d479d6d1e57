"""Deformable attention against grid_sample and finite differences."""

from __future__ import annotations

import pytest
import torch
from models import photos
from small import close, noise
from torch import Tensor
from torch.nn import functional as F

from foveate.dense import Canvas, DeformableAttention, Levels, sample_points
from foveate.dense.deformable import choose_heads

HEADS, POINTS = 3, 2


def reference(
    value: Tensor, shapes: list[tuple[int, int]], points: Tensor, weights: Tensor
) -> Tensor:
    """The slow way: one map a level and head, read by grid_sample, for images that are whole."""
    batch, _, heads, width = value.shape
    total = value.new_zeros(batch, points.shape[1], heads, width)
    for level, part in enumerate(value.split([h * w for h, w in shapes], 1)):
        h, w = shapes[level]
        for head in range(heads):
            cells = part[:, :, head].transpose(1, 2).view(batch, width, h, w)
            where = points[:, :, head, level]  # [B, Q, points, 2]
            size = torch.tensor([w, h], dtype=where.dtype)
            grid = (2 * where + 1) / size - 1
            read = F.grid_sample(cells, grid, "bilinear", "zeros", False)  # [B, d, Q, points]
            read = (read * weights[:, None, :, head, level]).sum(-1)
            total[:, :, head] = total[:, :, head] + read.transpose(1, 2)
    return total


def case(canvas: Canvas, dtype: torch.dtype = torch.float64) -> tuple[Levels, list[Tensor]]:
    levels = Levels.of(canvas, (2.0, 1.0, 0.5))
    batch, queries = len(canvas.grids), 7
    shape = (batch, queries, HEADS, 3, POINTS)
    value = noise(batch, sum(levels.lengths), HEADS, 4).to(dtype)
    # Some of the points lie outside of the maps.
    points = noise(*shape, 2, seed=1).to(dtype) * 4 + 3
    return levels, [value, points, noise(*shape, seed=2).to(dtype).softmax(-1)]


def whole(batch: int = 2) -> Canvas:
    return Canvas.of(torch.zeros(batch, 3, 32, 48), (8, 8), 2)


def test_equals_grid_sample_with_gradients() -> None:
    levels, inputs = case(whole())
    inputs = [t.requires_grad_() for t in inputs]
    found = sample_points(inputs[0], levels, *inputs[1:])
    wanted = reference(inputs[0], list(levels.shapes), *inputs[1:])
    close(found, wanted, 1e-12)
    cotangent = noise(*found.shape, seed=3).double()
    pairs = zip(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(wanted, inputs, cotangent),
        strict=True,
    )
    for a, b in pairs:
        close(a, b, 1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    levels, inputs = case(whole(1))
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda *t: sample_points(t[0], levels, *t[1:]),
        inputs,
        eps=1e-6,
        atol=1e-6,
        fast_mode=True,  # a random direction of all entries at once
    )


def test_padding_is_outside() -> None:
    """An image in a padded batch reads what it reads alone, whatever stands in the padding."""
    images = photos((32, 48), (16, 24))
    batch = Canvas.of(images, (8, 8), 2)
    alone = Canvas.of(images[1:], (8, 8), 2)
    levels, (value, points, weights) = case(batch, torch.float32)
    found = sample_points(value, levels, points, weights)[1]
    own = Levels.of(alone, (2.0, 1.0, 0.5))
    parts = []
    for part, shape, mine in zip(
        value[1].split(levels.lengths), levels.shapes, own.shapes, strict=True
    ):
        parts.append(part.unflatten(0, shape)[: mine[0], : mine[1]].flatten(0, 1))
    wanted = sample_points(torch.cat(parts)[None], own, points[1:], weights[1:])[0]
    close(found, wanted, 1e-6)


def test_positions_agree_between_levels() -> None:
    """A query without offsets reads the middle of its own cell."""
    levels = Levels.of(whole(1), (1.0,))
    value = levels.positions[None, :, None, :]  # each cell holds where it is
    points = (levels.positions - 0.5)[None, :, None, None, None]
    weights = torch.ones(points.shape[:-1])
    close(sample_points(value, levels, points, weights)[0, :, 0], levels.positions, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_under_autocast(dtype: torch.dtype) -> None:
    canvas = whole()
    levels = Levels.of(canvas, (2.0, 1.0, 0.5))
    layer = DeformableAttention(12, heads=HEADS, levels=3, points=POINTS)
    query = noise(2, 24, 12).requires_grad_()
    value = noise(2, sum(levels.lengths), 12, seed=1).requires_grad_()
    positions = Levels.of(canvas, (1.0,)).positions
    plain = layer(query, positions, value, levels)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = layer(query, positions, value, levels)
    close(out.float(), plain, 3e-2)
    out.float().square().mean().backward()
    for tensor in (query, value, *layer.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


def test_heads_are_chosen_or_refused() -> None:
    assert choose_heads(384, None, 6) == 6
    assert choose_heads(128, None, 4) == 4  # 6 does not divide it
    with pytest.raises(ValueError, match="must divide the width 128, got 6; numbers that do: 1, 2"):
        choose_heads(128, 6, 4)


@pytest.mark.slow
def test_compiles_whole() -> None:
    levels, (value, points, weights) = case(whole(), torch.float32)
    compiled = torch.compile(sample_points, fullgraph=True)
    close(compiled(value, levels, points, weights), sample_points(value, levels, points, weights))
