"""What tests of exported models share."""

from __future__ import annotations

import pytest

__all__ = ["needs"]

PACKAGES = {
    "onnx": ("onnxscript", "onnxruntime"),
    "openvino": ("onnxscript", "openvino", "nncf"),
    "pt2": (),
}


def needs(format: str) -> None:
    """Skip where the packages of a format are not installed."""
    for package in PACKAGES[format]:
        pytest.importorskip(package, reason=f"the extra '{format}' is not installed")
