"""Orders in which equal tokens stay as they stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foveate.ops import highest_first, marked_first

# Torch sorts short rows stably even where that is not asked for.
SCORES = torch.randint(0, 3, (2, 300), generator=torch.Generator().manual_seed(0)).float()
MARKS = SCORES > 0


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def wanted(rows: Tensor) -> list[list[int]]:
    return [
        sorted(range(len(row)), key=lambda place, row=row: (-float(row[place]), place))
        for row in rows.tolist()
    ]


def takes_compiled_for_exported() -> bool:
    """Whether ``is_exporting`` is wrong under ``torch.compile``, as in torch 2.9."""
    probe = torch.compile(lambda x: x + int(torch.compiler.is_exporting()), backend="eager")
    return bool(probe(torch.zeros(())) == 1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (highest_first, torch.tensor([[1.0, 3.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])),
        (marked_first, torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 1, 0]]).bool()),
        (marked_first, MARKS),
    ],
)
def test_equal_ones_stay_in_order(
    function: Callable[[Tensor], Tensor], rows: Tensor, strict: bool
) -> None:
    assert function(rows).tolist() == wanted(rows)
    program = torch.export.export(Called(function), (rows,), strict=strict)
    assert program.module()(rows).tolist() == wanted(rows)
    used = {str(node.target) for node in program.graph.nodes}
    assert any("sort" in name for name in used)
    assert not any("stable" in name for name in used), "torch's exporter to ONNX has no stable sort"


@pytest.mark.parametrize(("function", "rows"), [(highest_first, SCORES), (marked_first, MARKS)])
def test_many_equal_ones_stay_in_order_when_compiled(
    function: Callable[[Tensor], Tensor], rows: Tensor
) -> None:
    assert function(rows).tolist() == wanted(rows)
    if function is highest_first and takes_compiled_for_exported():
        pytest.skip("this torch takes compiled functions for exported ones")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert compiled(rows).tolist() == wanted(rows)
