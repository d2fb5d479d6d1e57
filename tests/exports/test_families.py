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
# Its pooling in transformers has the number of images in its graph.
FIXED_BATCH = {"hf_siglip"}


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name", "method"), dict.fromkeys(CASES))
def test_any_batch_answers_as_torch(format: str, name: str, method: str, tmp_path: Path) -> None:
    needs(format)
    if format == "openvino" and method.startswith("random"):
        pytest.skip("OpenVINO computes whole numbers in 32 bits: random keeps other patches there")
    model = reduced(method, name)
    if name in FIXED_BATCH:
        with pytest.raises(ValueError, match="cannot capture a .* for any number of images"):
            foveate.export(model, tmp_path, format=format)
    batch = 2 if name in FIXED_BATCH else None
    found = foveate.export(model, tmp_path, format=format, batch=batch)
    run = found.open(threads=1)
    with torch.no_grad():
        for count in (1, 2, 5) if batch is None else (batch,):
            x = images(count)
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
        batch=2 if name in FIXED_BATCH else None,
        int8=True,
        calibrate=images(16),
        check=True,
        images=images(16, seed=1),
        rounds=0,
    )
    assert found.check is not None and 1e-4 < found.check.error < 2  # of the worst image
    assert found.check.divergence is None or found.check.divergence < 0.1
    assert np.isfinite(found.open()(images(2).numpy())[0]).all()
