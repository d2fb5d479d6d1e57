"""Every family in every format, and every method with a fixed count on the plain ViT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from contract.table import FORMS, METHODS, close, form, images, reduced, said
from formats import needs

import foveate
from foveate.exports import FORMATS

FIXED = [row.method for row in METHODS if row.modes[0] == "gathered"]
CASES = [
    *((format, name, "tome(r=5)") for name in FORMS for format in FORMATS),
    *((format, "vit", method) for method in FIXED for format in FORMATS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name", "method"), dict.fromkeys(CASES))
def test_any_batch_answers_as_torch(format: str, name: str, method: str, tmp_path: Path) -> None:
    needs(format)
    model = reduced(method, name)
    found = foveate.export(model, tmp_path, format=format)
    run = found.open(threads=1)
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = images(batch)
            close(torch.from_numpy(run(x.numpy())[0]), said(model, x), 1e-4)
    counts = model.trace(images(1)).counts()
    assert found.tokens == tuple(one[0] for one in counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_eight_bits_on_any_family(name: str, tmp_path: Path) -> None:
    needs("openvino")
    plain = form(name)
    found = foveate.export(
        plain,
        tmp_path,
        format="openvino",
        int8=True,
        calibrate=images(16),
        check=True,
        images=images(16, seed=1),
        rounds=0,
    )
    assert found.check is not None and 1e-4 < found.check.error < 0.7
    assert np.isfinite(found.open()(images(2).numpy())[0]).all()
