"""Folders as COCO has them, made for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = [[2.0, 1.0, 6.0, 1.0, 6.0, 5.0, 2.0, 5.0]]


def annotation(own: int, image: int, box: Any = (2, 1, 4, 4), **more: Any) -> dict[str, Any]:
    made = {"id": own, "image_id": image, "category_id": 3, "bbox": list(box), "iscrowd": 0}
    return {**made, "area": 16.0, "segmentation": SQUARE, **more}


def content(annotations: list[Any], count: int = 3, **more: Any) -> dict[str, Any]:
    """Images 0, 1, ... of 12 x 8 pixels; categories with a hole in their ids."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 8, "width": 12} for i in range(count)
        ],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}],
        **more,
    }


def folder(root: Path, made: Any, split: str = "train", images: int = 3, year: str = "") -> Path:
    """Write annotations and images, whose red says their number, in the usual layout."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{split}{year}").mkdir(exist_ok=True)
    text = made if isinstance(made, str) else json.dumps(made)
    (root / "annotations" / f"instances_{split}{year}.json").write_text(text)
    for i in range(images):
        pixels = np.zeros((8, 12, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1] = 10 * i, sum(map(ord, split)) % 256
        Image.fromarray(pixels).save(root / f"{split}{year}" / f"{i}.png")
    return root
