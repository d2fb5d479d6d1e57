"""Methods with a fixed count serve every batch size: compiled, exported, and as ONNX."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from table import FORMS, METHODS, Row, close, compilations, form, images, reduced, said
from torch import Tensor, nn

import foveate

FIXED = [row for row in METHODS if row.modes[0] == "gathered"]
NAMES = [name for name in ("vit", "dinov3", "siglip", "hf_vit", "multiscale") if name in FORMS]
QUICK = {("evit(keep=0.7)", "vit")}


class Said(nn.Module):
    """Answers with logits alone, so that every family exports alike."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return said(self.model, x)


def cases() -> list[object]:
    """Every method on the plain ViT, every fifth on each other family; the rest are crossings."""
    found = []
    for i, row in enumerate(FIXED):
        for j, name in enumerate(NAMES):
            near = name == "vit" or (i + j) % 5 == 0
            marks = [] if (row.method, name) in QUICK else [pytest.mark.slow]
            marks = marks if near or not marks else [pytest.mark.crossing]
            found.append(pytest.param(row, name, id=f"{row.method}-{name}", marks=marks))
    return found


CASES = cases()


@pytest.mark.slow
@pytest.mark.parametrize(("row", "name"), CASES)
def test_seven_batch_sizes_take_no_more_compilations_than_the_stock_model(
    row: Row, name: str
) -> None:
    sizes = (1, 2, 3, 4, 5, 6, 7)
    assert compilations(reduced(row, name), sizes) <= compilations(form(name), sizes) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(("row", "name"), CASES)
def test_a_dynamic_batch_compiles_once(row: Row, name: str) -> None:
    model = reduced(row, name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in (2, 5):
            close(said(compiled, images(size)), said(model, images(size)))


@pytest.mark.parametrize(("row", "name"), CASES)
def test_exports_with_a_dynamic_batch(row: Row, name: str) -> None:
    model = Said(reduced(row, name)).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(3),), dynamic_shapes={"x": {0: batch}})
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        again = torch.export.load(buffer).module()
        for size in (2, 5):
            close(again(images(size)), model(images(size)))


@pytest.mark.slow
@pytest.mark.parametrize(("row", "name"), CASES)
def test_runs_as_onnx_with_a_dynamic_batch(row: Row, name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Said(reduced(row, name)).eval()
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (images(3),), dynamo=True, dynamic_shapes={"x": {0: batch}}, verbose=False
        )
        program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    for size in (2, 5):
        x = images(size)
        (got,) = session.run(None, {entry: x.numpy()})
        with torch.no_grad():
            close(torch.from_numpy(got), model(x), 1e-4)


@pytest.mark.parametrize("method", foveate.list_methods())
def test_quantised_linears_run(method: str) -> None:
    """torch's dynamic quantisation replaces linear layers, whose weights nobody may slice."""
    model = reduced(method, "vit")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        out = quantised(images())
    assert torch.isfinite(out).all() and out.shape == (3, 10)
    assert quantised is not model and not torch.equal(out, model(images()))
