"""Write files of ``torch.export``, which run where torch is installed, without foveate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.exports.graph import Graph
from foveate.files import write_whole

__all__ = ["FILE", "RUNTIME", "tokens", "write"]

FILE, RUNTIME = "model.pt2", "torch"


def write(graph: Graph, path: Path) -> None:
    """Write a graph, in which equal scores keep their order from here on."""
    _sort_stably(graph.program)

    def save(partial: str) -> None:
        with open(partial, "wb") as file:
            torch.export.save(graph.program, file)

    write_whole(path, save)


def tokens(path: Path, layers: Sequence[str], images: np.ndarray) -> tuple[int, ...]:
    """Run the file and count the tokens of one image that each block computes."""
    found: dict[str, int] = {}

    class Watched(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node.name in layers:
                found[node.name] = value.numel() // value.shape[-1]
            return value

    module: Any = torch.export.load(str(path)).module()
    with torch.no_grad():
        Watched(module).run(torch.from_numpy(images))
    return tuple(found[name] // len(images) for name in layers)


def _sort_stably(program: torch.export.ExportedProgram) -> None:
    """Let every sort keep equal values in order, as the model does outside of a graph."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.sort.default:
            node.target = torch.ops.aten.sort.stable
            # Only the values may be given by position there.
            given = dict(zip(("dim", "descending"), node.args[1:], strict=False))
            node.args, node.kwargs = node.args[:1], {"stable": True, **given, **node.kwargs}
    program.graph_module.recompile()
