"""Methods with a fixed count compile into one graph and give the same answers."""

from __future__ import annotations

import pytest
import torch
from table import FORMS, METHODS, Row, close, images, reduced, said

FIXED = [row for row in METHODS if row.modes[0] == "gathered"]
NAMES = [name for name in ("vit", "dinov3", "siglip", "hf_vit", "hf_siglip") if name in FORMS]
QUICK = {"evit(keep=0.7)", "tome(r=5)"}


def param(row: Row, form: str) -> object:
    quick = row.method in QUICK and form == "vit"
    return pytest.param(
        row, form, id=f"{row.method}-{form}", marks=() if quick else pytest.mark.slow
    )


@pytest.mark.parametrize(("row", "name"), [param(row, form) for row in FIXED for form in NAMES])
def test_compiles_into_one_graph(row: Row, name: str) -> None:
    model = reduced(row, name)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = said(model, images())
        # Lowering to C++ adds minutes and no meaning here: the whole graph must be captured and
        # its operators decomposed. The benchmark runs the real compiler.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        close(said(compiled, images()), eager)
