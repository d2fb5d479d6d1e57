"""Orders in which equal tokens stay as they stand, also in a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foveate.ops import highest_first, marked_first


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (highest_first, torch.tensor([[1.0, 3.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])),
        (marked_first, torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 1, 0]]).bool()),
    ],
)
def test_equal_ones_stay_in_order(function: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    wanted = [
        sorted(range(len(row)), key=lambda place, row=row: (-float(row[place]), place))
        for row in rows.tolist()
    ]
    assert function(rows).tolist() == wanted
    program = torch.export.export(Called(function), (rows,))
    assert program.module()(rows).tolist() == wanted
    used = {str(node.target) for node in program.graph.nodes}
    assert not any("stable" in name for name in used), "torch's exporter to ONNX has no stable sort"
