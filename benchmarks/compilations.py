"""Count how often a model is compiled for several batch sizes, against the stock model.

    python benchmarks/compilations.py --out benchmarks/results/compilations.json

The contract tests define the models and count the compilations. A model has four blocks of 48
channels with the blocks, prefix tokens and pooling of its family; the number of compilations does
not depend on its size. Compiled outputs must equal eager ones at each batch size. Methods whose
count depends on the image are not in the table: they run packed, where each batch has its own
lengths.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))
from table import METHODS, compilations, form, reduced

FAMILIES = ("vit", "dinov2_reg4", "siglip", "dinov3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7], help="batch sizes"
    )
    fixed = [row.method for row in METHODS if row.modes[0] == "gathered"]
    parser.add_argument(
        "--methods", nargs="+", default=fixed, help="methods (default: all with a fixed count)"
    )
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, int]] = {}
    for method in ("stock", *args.methods):
        rows[method] = {}
        for family in FAMILIES:
            model = form(family) if method == "stock" else reduced(method, family)
            rows[method][family] = compilations(model, tuple(args.batches))
        print(method, rows[method], flush=True)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "batches": args.batches,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "compilations": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
