"""Measure what exports and 8 bits cost in accuracy, on the model and the test images that ship.

    python benchmarks/export_accuracy.py --out export_accuracy.json

The model "demo" (Fashion-MNIST, 28 px) with some methods, as torch, onnxruntime and OpenVINO
compute it, in float32 and in 8 bits, which are fitted to the training images that ship. Accuracy is
in per cent of the 2 000 test images; "same class" is the share of them that torch puts in the same
class.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import foveate
from foveate import machine
from foveate.convert import open_shipped
from foveate.data import Inputs, fashion_mnist_mini

METHODS = ("evit(keep=0.7)", "dynamicvit(keep=0.7)", "tokenmergence(keep=0.7)", "tome(r=3)")
FORMATS = ("onnx", "openvino")


def measured(method: str | None, pixels: Tensor, labels: Tensor) -> list[dict[str, object]]:
    """Return a row for each runtime of the model with a method; None is the model without one."""
    model = open_shipped("demo")
    model = (model if method is None else foveate.apply(model, method)).eval()
    with torch.no_grad():
        wanted = model(pixels).argmax(1)
    answers = {"torch": wanted}
    for kind, int8 in product(FORMATS, (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            found = foveate.export(model, folder, format=kind, int8=int8)
            (logits,) = found.open()(pixels.numpy())
        answers[kind + ", 8 bits" * int8] = torch.from_numpy(logits).argmax(1)
    rows = []
    for runtime, said in answers.items():
        top1, same = (100 * float((said == what).float().mean()) for what in (labels, wanted))
        rows.append({"method": method or "dense", "runtime": runtime})
        rows[-1] |= {"top1": round(top1, 2), "same class": round(same, 2)}
        print("{method:24} {runtime:18} {top1:6} {same class:6}".format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure all methods, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    tests, inputs = fashion_mnist_mini("test"), Inputs.of(open_shipped("demo"))
    mean, std = (torch.tensor(one).view(1, -1, 1, 1) for one in (inputs.mean, inputs.std))
    pixels = (tests.images / 255 - mean) / std
    rows = [row for one in (None, *options.methods) for row in measured(one, pixels, tests.labels)]
    if options.out is not None:
        record = {"machine": machine.facts("cpu"), "commit": machine.commit(), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
