"""Write ONNX files, which onnxruntime runs."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.exports.graph import Graph
from foveate.files import write_whole

__all__ = ["FILE", "LEAST_OPSET", "RUNTIME", "WEIGHTS", "quantise", "tokens", "write"]

FILE, WEIGHTS, RUNTIME = "model.onnx", "model.onnx.data", "onnxruntime"
LEAST_OPSET = 18  # the lowest that torch's exporter writes
_BIGGEST = 1_900_000_000  # bytes of weights in one file: protobuf holds no more than 2 GiB


def write(graph: Graph, path: Path, opset: int | None = None) -> None:
    """Write a graph.

    Args:
        graph: graph to write.
        path: path of the file.
        opset: version of the operators; None takes the one that torch's exporter prefers. Raises
            ValueError for one that it cannot write.
    """
    with _quiet():
        made: Any = torch.onnx.export(
            graph.program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(graph.outputs),
            verbose=False,
        )
    # For one that it does not know, the exporter mixes versions in a file that no runtime accepts.
    if opset is not None and made.model.opset_imports[""] != opset:
        raise ValueError(f"opset {opset} is newer than torch can write: take a lower one")
    size = sum(value.numel() * value.element_size() for value in graph.program.state_dict.values())
    if size > _BIGGEST:  # the weights go into a file beside it, which the graph names
        made.save(str(path), external_data=True)
    else:
        _write_alone(path, lambda partial: made.save(partial, external_data=False))


def quantise(path: Path, graph: Graph, images: np.ndarray) -> None:
    """Replace a file by one whose matrix products compute in 8 bits.

    Args:
        path: path of a file that ``write`` wrote.
        graph: graph that the file was made from.
        images: preprocessed images ``[N, C, H, W]``, which give the ranges of values.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quiet():
        ready, made = Path(folder, "ready.onnx"), Path(folder, "made.onnx")
        # Symbolic shape inference does not know all operators of merging methods.
        quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        nodes = onnx.load(str(ready), load_external_data=False).graph.node
        exact = [node.name for node in _products(nodes, graph.deciding)]
        quantize_static(
            str(ready),
            str(made),
            _Reader(graph.calls(images)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=exact,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        _write_alone(path, lambda partial: Path(partial).write_bytes(made.read_bytes()))


def _products(nodes: Sequence[Any], values: Sequence[str]) -> list[Any]:
    """Return the nodes whose outputs have these names, and the products that feed them."""
    found = [node for node in nodes if {*node.output} & {*values}]
    inputs = {name for node in found for name in node.input}
    return found + [one for one in nodes if one.op_type == "MatMul" and {*one.output} & inputs]


def _write_alone(path: Path, write: Callable[[str], object]) -> None:
    """Write a file that holds its own weights, and remove those that lay beside a former one."""
    write_whole(path, write)
    path.with_name(WEIGHTS).unlink(missing_ok=True)


def tokens(path: Path, layers: Sequence[str], images: np.ndarray) -> tuple[int, ...]:
    """Run the file and count the tokens of one image that each block computes."""
    import onnx
    import onnxruntime

    model = onnx.load(str(path))
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in layers)
    with tempfile.TemporaryDirectory() as folder:
        watched = str(Path(folder, "watched.onnx"))
        onnx.save(model, watched, save_as_external_data=True)
        session = onnxruntime.InferenceSession(watched, providers=["CPUExecutionProvider"])
    found = session.run(list(layers), {session.get_inputs()[0].name: images})
    return tuple(value.size // value.shape[-1] // len(images) for value in found)


class _Reader:
    """Returns the images of one call after another, as onnxruntime's calibration reads them."""

    def __init__(self, calls: Sequence[np.ndarray]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self._calls, None)
        return None if images is None else {"images": images}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the messages of the exporter and the quantiser off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
