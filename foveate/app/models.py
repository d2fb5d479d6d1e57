"""Keep a few models open, so that a click need not open them again and memory does not grow."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from torch import nn

from foveate.app.places import Places
from foveate.convert import open_base
from foveate.dense import DenseModel

__all__ = ["Models"]


class Models:
    """Opens models by name and keeps those that were used last.

    Attributes:
        places: what may be opened.
        device: where models are put.
        most: number of models that are kept.
    """

    def __init__(self, places: Places, device: str = "cpu", most: int = 3) -> None:
        self.places, self.device, self.most = places, device, most
        self._kept: OrderedDict[tuple[str, bool, float], nn.Module] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, given: str, *, untrained: bool = False) -> nn.Module:
        """Return a model in evaluation mode; it is opened again if its files changed.

        Args:
            given: a model that ships, a name of timm, or a path in the given folders.
            untrained: take a timm model with random weights instead of fetching its own.
        """
        name = self.places.model(given)
        key = (name, untrained, _changed(name))
        if key not in self._kept:
            while len(self._kept) >= self.most:  # before the new one needs memory
                self._kept.popitem(last=False)
            self._kept[key] = open_base(name, untrained=untrained).to(self.device)
        self._kept.move_to_end(key)
        return self._kept[key]

    def dense(self, given: str) -> DenseModel:
        """Return a detector or a segmenter; ValueError for other models."""
        model = self.open(given)
        if not isinstance(model, DenseModel):
            raise ValueError(f"{given} is neither a detector nor a segmenter")
        return model


def _changed(name: str) -> float:
    """Return when the newest of a model's files was written; 0 for a name."""
    path = Path(name)
    if not path.is_absolute():
        return 0.0
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files if file.exists())
