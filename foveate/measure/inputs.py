"""How a model takes its images in evaluation, as its own configuration says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from foveate.backbones import backbone_for
from foveate.core import ReducedViT
from foveate.data import Preprocessing

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """What images become before a model sees them.

    Attributes:
        size: height and width in pixels.
        channels: 1 or 3.
        mean, std: of each channel, of pixels in [0, 1].
        crop_pct: the size over that of the short side from which the middle is cut.
        interpolation: of the resizing.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str

    @classmethod
    def of(cls, model: nn.Module) -> Inputs:
        """Read a model's inputs off the model, plain or from ``foveate.apply``."""
        backbone = model.backbone if isinstance(model, ReducedViT) else backbone_for(model)
        known = Preprocessing.of(model)
        (rows, columns), (height, width) = backbone.spec.grid, backbone.spec.patch
        config: Any = getattr(backbone.model, "config", None)
        if hasattr(config, "model_type"):  # of transformers
            crop_pct, interpolation = _of_folder(getattr(config, "_name_or_path", ""))
        else:
            found = resolve_model_data_config(backbone.model)
            crop_pct, interpolation = float(found["crop_pct"]), str(found["interpolation"])
        return cls(
            size=(rows * height, columns * width),
            channels=backbone.channels,
            mean=known.mean,
            std=known.std,
            crop_pct=crop_pct,
            interpolation=interpolation,
        )


def _of_folder(folder: str) -> tuple[float, str]:
    """Return crop and interpolation that a Hugging Face folder names beside its weights.

    Without them the short side is resized to the size, which is what most of its processors do to
    square images.
    """
    crop_pct, interpolation = 1.0, "bicubic"
    try:
        text = (Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8")
        found = json.loads(text)
        if "resample" in found:
            interpolation = Image.Resampling(found["resample"]).name.lower()
        if found.get("do_center_crop"):
            cut = found["crop_size"]
            cut = cut["height"] if isinstance(cut, dict) else cut
            crop_pct = min(1.0, cut / found["size"]["shortest_edge"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return crop_pct, interpolation
