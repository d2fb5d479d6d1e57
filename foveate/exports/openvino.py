"""Write files in OpenVINO's own format, by way of ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.exports import onnx
from foveate.exports.graph import Graph

__all__ = ["BY_IMAGE", "FILE", "RUNTIME", "WEIGHTS", "quantise", "tokens", "write"]

FILE, WEIGHTS, RUNTIME = "model.xml", "model.bin", "openvino"
# Around layers that see flat tokens OpenVINO rounds to 8 bits in passes of their own.
BY_IMAGE = True


def write(graph: Graph, path: Path, opset: int | None = None) -> None:
    """Write a graph, with its weights in a file beside it; arguments as for ``onnx.write``."""
    import openvino

    # Going by way of ONNX takes a third of the time of reading torch's graph; it runs as fast.
    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder, onnx.FILE)
        onnx.write(graph, between, opset)
        _save(openvino.convert_model(str(between)), path)


def quantise(path: Path, graph: Graph, images: np.ndarray) -> None:
    """Replace a file by one with matrix products in 8 bits; arguments as for ``onnx.quantise``."""
    import nncf
    import openvino

    model, calls = openvino.Core().read_model(str(path)), graph.calls(images)
    exact = [*_products(model, graph.deciding), *_lookups(model)]
    with _quiet():
        made = nncf.quantize(
            model,
            nncf.Dataset(calls),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calls),
            ignored_scope=nncf.IgnoredScope(names=exact),
        )
    _save(made, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's messages and progress bars off the terminal; its logger stays as it was.

    NNCF's own function would also set the level of whatever handlers the logger has been given.
    """
    log = logging.getLogger("nncf")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


def tokens(path: Path, layers: Sequence[str], images: np.ndarray) -> tuple[int, ...]:
    """Run the file and count the tokens of one image that each block computes."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.add_outputs(list(layers))
    watched = core.compile_model(model, "CPU")
    found = watched([images])
    values = [found[watched.output(name)] for name in layers]
    return tuple(value.size // value.shape[-1] // len(images) for value in values)


def _products(model: Any, values: Sequence[str]) -> list[str]:
    """Name the operations whose outputs have these names, and the products that feed them."""
    wanted, found = {*values}, []
    for operation in model.get_ops():
        if any({*output.get_names()} & wanted for output in operation.outputs()):
            found.append(operation.get_friendly_name())
            inputs = [port.get_source_output().get_node() for port in operation.inputs()]
            found += [n.get_friendly_name() for n in inputs if n.get_type_name() == "MatMul"]
    return found


def _lookups(model: Any) -> list[str]:
    """Name the operations that look values up in a constant.

    NNCF takes the constant for the weights of an embedding. It is how many patches each token
    stands for, and OpenVINO crashes on it in 8 bits.
    """
    gathers = [one for one in model.get_ops() if one.get_type_name() == "Gather"]
    tables = [one.input(0).get_source_output().get_node().get_type_name() for one in gathers]
    named = zip(gathers, tables, strict=True)
    return [one.get_friendly_name() for one, table in named if table == "Constant"]


def _save(model: Any, path: Path) -> None:
    """Write both files, the weights first, because readers open the other one."""
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        openvino.save_model(model, str(made), compress_to_fp16=False)
        made.with_suffix(".bin").replace(path.with_suffix(".bin"))
        made.replace(path)
