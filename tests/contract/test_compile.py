"""Methods with a fixed count compile into one graph and give the same answers."""

from __future__ import annotations

import pytest
import torch
from table import METHODS, Row, close, images, reduced

FIXED = [row for row in METHODS if row.modes[0] == "gathered"]
QUICK = {"evit(keep=0.7)", "tome(r=5)"}


def param(row: Row, form: str) -> object:
    quick = row.method in QUICK and form == "vit"
    return pytest.param(
        row, form, id=f"{row.method}-{form}", marks=() if quick else pytest.mark.slow
    )


@pytest.mark.parametrize(
    ("row", "name"), [param(row, form) for row in FIXED for form in ("vit", "dinov3", "siglip")]
)
def test_compiles_into_one_graph(row: Row, name: str) -> None:
    model = reduced(row, name)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = model(images())
        # Lowering to C++ adds minutes and no meaning here: the whole graph must be captured and
        # its operators decomposed. The benchmark runs the real compiler.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        close(compiled(images()), eager)
