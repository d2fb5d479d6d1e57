"""Write the part of Fashion-MNIST that ships with the package.

python benchmarks/pack_fashion_mnist.py FOLDER
"""

from __future__ import annotations

import io
import lzma
import sys
from pathlib import Path

import numpy as np

from foveate.data import fashion_mnist

OUT = Path(__file__).parents[1] / "foveate" / "data" / "files" / "fashion_mnist_mini.npz.xz"
EACH = {"train": 300, "test": 200}  # images of each class


def main() -> None:
    """Pack the first images of each class."""
    arrays = {}
    for part, each in EACH.items():
        images, labels = fashion_mnist(sys.argv[1], part)
        chosen = sorted(
            int(i) for label in range(10) for i in (labels == label).nonzero().flatten()[:each]
        )
        arrays[f"{part}_images"] = images[chosen, 0].numpy()
        arrays[f"{part}_labels"] = labels[chosen].numpy().astype(np.uint8)
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    OUT.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
