"""Multi-scale deformable attention: every query reads a few points that it chooses itself.

Paper: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
ICLR 2021.

Reading a point bilinearly is a weighted sum of four cells, so the result of a query is a weighted
sum of rows of one table. torch has this as ``embedding_bag`` with weights, so no kernel of our own
is needed. Both the table of values and the result lie in token order; nothing is transposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.dense.canvas import Canvas

__all__ = ["DeformableAttention", "Levels", "choose_heads", "sample_points"]


@dataclass(eq=False)
class Levels:
    """Maps of several sizes over one canvas; the cells of all maps form one row of tokens.

    Attributes:
        scales: cells per patch of each level.
        shapes: rows and columns of each map.
        extent: columns and rows of each level that are real: two numbers, or two tensors ``[B]``
            where images differ.
        positions: middle of each cell on the canvas, in patches: ``[S, 2]``, x first.
    """

    scales: tuple[float, ...]
    shapes: tuple[tuple[int, int], ...]
    extent: tuple[tuple[int | Tensor, int | Tensor], ...]
    positions: Tensor

    @classmethod
    def of(
        cls, canvas: Canvas, scales: tuple[float, ...], grid: tuple[int, int] | None = None
    ) -> Levels:
        """Describe maps over a canvas; ``grid`` is the size of a single map smaller than it."""
        device = canvas.images.device
        shapes = tuple(canvas.cells(scale) if grid is None else grid for scale in scales)
        grids = (canvas.grid,) if canvas.whole else canvas.grids
        extent = tuple(
            (
                _common([math.ceil(w * scale) for _, w in grids], device),
                _common([math.ceil(h * scale) for h, _ in grids], device),
            )
            for scale in scales
        )
        middles = []
        for (rows, columns), scale in zip(shapes, scales, strict=True):
            y = (torch.arange(rows, device=device) + 0.5) / scale
            x = (torch.arange(columns, device=device) + 0.5) / scale
            across, down = torch.meshgrid(x, y, indexing="xy")
            middles.append(torch.stack([across, down], -1).flatten(0, 1))
        return cls(scales, shapes, extent, torch.cat(middles))

    @property
    def lengths(self) -> list[int]:
        """Number of cells of each level."""
        return [rows * columns for rows, columns in self.shapes]

    @property
    def columns(self) -> list[int]:
        """Number of columns of each level."""
        return [columns for _, columns in self.shapes]


def _common(numbers: list[int], device: torch.device) -> int | Tensor:
    """Return one number if all are equal, else a tensor of all of them."""
    return numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers, device=device)


def sample_points(value: Tensor, levels: Levels, points: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of bilinear samples, ``[B, Q, heads, d]``.

    Cells outside an image count as zero, also in the padding of a level.

    Args:
        value: cells of all levels, ``[B, S, heads, d]``.
        levels: sizes of the levels, and which part of them is real.
        points: where each query samples, ``[B, Q, heads, levels, points, 2]``, x first; the middle
            of the first cell of a level is at 0.
        weights: weight of each sample, ``[B, Q, heads, levels, points]``.
    """
    batch, cells, heads, width = value.shape
    points, weights = _precise(points), _precise(weights)
    table = value.reshape(batch * cells * heads, width)
    if table.is_cuda and table.dtype == torch.bfloat16 and torch.is_grad_enabled():
        table = table.float()  # CUDA has no backward pass of weighted bags in bfloat16
    kind = torch.int32 if len(table) < 2**31 else torch.int64
    image = torch.arange(batch, device=value.device, dtype=kind).view(-1, 1, 1, 1, 1) * cells
    head = torch.arange(heads, device=value.device, dtype=kind).view(-1, 1, 1)
    total: Tensor | None = None
    start = 0
    for level, (length, columns) in enumerate(zip(levels.lengths, levels.columns, strict=True)):
        x, y = points[:, :, :, level].unbind(-1)  # [B, Q, heads, points]
        extent, weight = levels.extent[level], weights[:, :, :, level]
        # Each of the four corners takes its own pass over the points, because products that
        # broadcast over a last dimension of two take twice as long on a CPU.
        across = _neighbours(x, extent[0])
        down = [(cell * columns, part * weight) for cell, part in _neighbours(y, extent[1])]
        corners = [(row + column, a * b) for row, a in down for column, b in across]
        cell, share = (torch.stack(parts, -2) for parts in zip(*corners, strict=True))
        row = torch.add((image + start) * heads + head, cell.to(kind), alpha=heads)
        bags = row.flatten(0, 2).flatten(1)
        found = F.embedding_bag(
            bags, table, mode="sum", per_sample_weights=share.reshape(bags.shape).to(table.dtype)
        )
        total = found if total is None else total + found
        start += length
    assert total is not None
    return total.view(batch, -1, heads, width).to(value.dtype)


def _neighbours(places: Tensor, extent: int | Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the two cells around each place on a line, and the share of each that is read.

    Cells outside ``extent`` are moved inside, with share 0. Coordinates stay floats, which are
    exact here and faster on a CPU.
    """
    low = places.detach().floor()
    fraction = places - low
    found = []
    for cell, part in ((low, 1 - fraction), (low + 1, fraction)):
        if isinstance(extent, int):
            inside = cell.clamp(0, extent - 1)
        else:
            inside = cell.clamp_min(0).minimum(extent.view(-1, 1, 1, 1) - 1)
        found.append((inside, part * (cell == inside)))
    return found


def _precise(values: Tensor) -> Tensor:
    """Return at least float32, because half precision would round the places of points."""
    return values if values.dtype == torch.float64 else values.float()


def choose_heads(width: int, heads: int | None, fallback: int) -> int:
    """Return the number of heads: the one given, or 6 as in the paper where that divides.

    Args:
        width: width of the tokens, which the heads must divide.
        heads: number that the user asked for; None chooses.
        fallback: the ViT's own number of heads, taken where 6 does not divide the width.
    """
    if heads is None:
        heads = 6 if width % 6 == 0 else fallback
    if heads < 1 or width % heads:
        legal = [n for n in range(1, 33) if width % n == 0]
        raise ValueError(
            f"heads of deformable attention must divide the width {width}, got {heads}; "
            f"numbers that do: {', '.join(map(str, legal))}"
        )
    return heads


class DeformableAttention(nn.Module):
    """Attention in which each query reads ``points`` places per level, around its own place."""

    def __init__(
        self, width: int, *, heads: int, levels: int, points: int = 4, value_ratio: float = 1.0
    ) -> None:
        super().__init__()
        inner = int(width * value_ratio)
        if inner < 1 or inner % heads:
            raise ValueError(
                f"value_ratio {value_ratio} makes values {inner} wide, which {heads} heads do "
                "not divide"
            )
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, inner)
        self.output_proj = nn.Linear(inner, width)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start with equal weights; each head has a direction, its points at growing distances."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = direction[:, None, None] * steps.expand(-1, self.levels, -1, 1)
        with torch.no_grad():
            nn.init.zeros_(self.sampling_offsets.weight)
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, positions: Tensor, value: Tensor, levels: Levels) -> Tensor:
        """Answer queries ``[B, Q, C]`` from the cells of all levels ``[B, S, C]``.

        Args:
            query: normalised queries.
            positions: place of each query, in patches: ``[Q, 2]``, x first.
            value: normalised cells that are read.
            levels: sizes of the levels of ``value``.
        """
        shape = (*query.shape[:2], self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        weights = self.attention_weights(query).view(*shape[:3], -1)
        weights = weights.softmax(-1, dtype=torch.float32).view(shape)
        scales = positions.new_tensor(levels.scales)[:, None]
        middle = positions[:, None] * scales - 0.5  # [Q, levels, 2]
        points = middle[:, None, :, None] + offsets.float()
        values = self.value_proj(value).unflatten(-1, (self.heads, -1))
        return self.output_proj(sample_points(values, levels, points, weights).flatten(2))
