"""A comparison that takes seconds: two blocks, 64 images, one epoch, two seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from foveate import cli
from foveate.measure import cell
from foveate.measure.cells import Cell
from foveate.measure.launch import DONE, FAILED, Outcome

RECIPE = (
    "model: {name: vit_tiny_patch16_224, options: {img_size: 28, patch_size: 7, in_chans: 1,"
    " embed_dim: 32, depth: 2, num_heads: 2}}\n"
    "data: {train: fashion-mnist, mean: [0.286], std: [0.353], val_batch: 64}\n"
)
SHORT = [
    *("data.limit=64", "data.val_limit=64", "data.batch=32", "loop.epochs=1", "loop.log_every=1"),
    *("loop.check_every=1", "loop.loggers=[]", "optim.warmup_epochs=0", "data.val_share=0.2"),
    "optim.frozen_epochs=0",
]
METHOD = "reduced/masked/dynamicvit-0.5"
CELLS = [
    f"{folder}/seed{seed}{end}"
    for folder in ("models/base", "models/masked", METHOD)
    for seed in (0, 1)
    for end in ("", "/eval")
]


def write_config(folder: Path) -> Path:
    """Two base models, one from the other, a trained and an untrained method."""
    (folder / "full.yaml").write_text(RECIPE)
    dynamicvit = {
        "recipe": "fashion_part_dynamicvit",
        "method": "dynamicvit(keep={rate})",
        "rates": [0.5],
        "starts": ["masked"],
    }
    tree = {
        "seeds": [0, 1],
        "settings": SHORT,
        "models": {
            "base": {"recipe": str(folder / "full.yaml")},
            "masked": {
                **{"recipe": "fashion_part_masked", "start": "base"},
                "variants": ["evit(keep=0.5)"],
            },
        },
        "methods": {"dynamicvit": dynamicvit},
        "evaluate": {
            "models": ["masked"],
            "occlusion": [0, 0.5],
            "pruning": [0.5],
            "mask_seeds": 2,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def compare(*words: object) -> int:
    """The command, as a terminal would start it."""
    return cli.main(["compare", *map(str, words)])


class Here:
    """Runs cells in this process, which spares starting one, and notes their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def run(self, one: Cell, *_: object) -> Outcome:
        self.names.append(one.name)
        before = sys.stderr
        code = cell.main([str(one.file)])
        sys.stderr = before
        return Outcome(one.name, DONE if code == 0 else FAILED, f"exit code {code}" * code)
