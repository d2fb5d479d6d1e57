"""The cells of the demo: which methods at which rates, and what is measured of each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files

import torch
from torch import Tensor, nn

import foveate
from foveate.core import ReducedViT
from foveate.data import fashion_mnist_mini, normalise

__all__ = ["CELLS", "TRAINED", "Cell", "Row", "accuracy", "build", "evaluate", "shipped_images"]

# What ships trained at keep 0.7: the model with its method, or gates on the frozen demo model.
TRAINED = {"dynamicvit": "whole", "svit": "whole", "spvit": "gates", "static": "gates"}


@dataclass(frozen=True)
class Cell:
    """One method at one rate."""

    method: str
    rate: str

    @property
    def text(self) -> str:
        """As ``foveate.apply`` takes it; "" is the dense model."""
        return f"{self.method}({self.rate})" if self.rate else self.method


def _rates(method: str, *rates: str) -> list[Cell]:
    return [Cell(method, rate) for rate in rates]


_KEEPS = ("keep=0.9", "keep=0.7", "keep=0.5")
CELLS = (
    Cell("", ""),
    *_rates("attention", *_KEEPS),
    *_rates("evit", *_KEEPS),
    *_rates("tokenmergence", *_KEEPS),
    *_rates("tome", "r=1", "r=2", "r=3"),
    *_rates("pitome", "keep=0.95"),
    *_rates("atm", "threshold=0.9"),
    *_rates("cropr", "r=4"),
    *_rates("ats", "K=40", "K=28", "K=16"),
    *_rates("evovit", "keep=0.7", "keep=0.5"),
    *_rates("dynamicvit", *_KEEPS),
    *_rates("spvit", "keep=0.7, gate='topk'"),
    *_rates("svit", "keep=0.7", "keep=0.7, gate='topk'"),
    *_rates("static", *_KEEPS),
    *_rates("structural", "after_block=5"),
    *_rates("random", *_KEEPS),
)


@dataclass
class Row:
    """What was counted and measured of a cell.

    Attributes:
        method: "dense" or the method with its rate.
        accuracy: right answers on the shipped test images, per cent.
        gmacs: multiply-adds of an image, measured where images differ, in thousands of millions.
        tokens: tokens of the last block, mean over images.
        trained: "whole" with the method at keep 0.7, its "gates" alone, or "" for not at all.
        speed: for each batch size, speed over dense with its interval, and images per second.
    """

    method: str
    accuracy: float
    gmacs: float
    tokens: float
    trained: str
    speed: dict[int, dict[str, float]]


def shipped_images() -> tuple[Tensor, Tensor]:
    """The shipped test images, normalised, and their classes."""
    images, labels = fashion_mnist_mini("test")
    return normalise(images), labels


def build(cell: Cell, vit: nn.Module) -> nn.Module:
    """The model of a cell; what ships trained is loaded."""
    if not cell.method:
        return vit
    if cell.method not in TRAINED:
        return foveate.apply(vit, cell.text, check=False).eval()
    with as_file(files("foveate.data").joinpath("files", f"demo_{cell.method}")) as folder:
        shipped = foveate.load(folder, None if TRAINED[cell.method] == "whole" else vit)
    assert isinstance(shipped, ReducedViT)
    # The same weights at the rate of the cell.
    model = foveate.apply(shipped.vit, cell.text, check=False).eval()
    model.reducer.load_state_dict(shipped.reducer.state_dict())
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Right answers in per cent."""
    right = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(labels)


def evaluate(cell: Cell, model: nn.Module, images: Tensor, labels: Tensor) -> Row:
    """Accuracy and counts of a cell's model; speed is measured for all cells together."""
    if isinstance(model, ReducedViT) and not model.reducer.fixed_count:
        counted = foveate.count(model, images=images[:500])
    else:
        counted = foveate.count(model)
    return Row(
        method=cell.text or "dense",
        accuracy=accuracy(model, images, labels),
        gmacs=counted.macs / 1e9,
        tokens=counted.tokens[-1],
        trained=TRAINED.get(cell.method, ""),
        speed={},
    )
