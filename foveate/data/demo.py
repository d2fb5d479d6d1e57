"""The small ViT that ships with the package, trained on Fashion-MNIST."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

from safetensors.torch import load_file
from torch import nn

from foveate.data.fashion import CLASSES, MEAN, STD

__all__ = ["demo_arguments", "demo_vit"]


def demo_arguments() -> dict[str, Any]:
    """Return arguments of timm's VisionTransformer: 1.3 M parameters, 7 x 7 patches, 12 blocks."""
    return {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 96,
        "depth": 12,
        "num_heads": 3,
        "num_classes": 10,
    }


def demo_vit() -> nn.Module:
    """Return the trained model in evaluation mode, for grey images of 28 x 28 and ten classes."""
    from timm.models import VisionTransformer

    model: Any = VisionTransformer(**demo_arguments())
    # Where timm's models say how their images are prepared.
    model.pretrained_cfg = {"mean": (MEAN,), "std": (STD,), "input_size": (1, 28, 28)}
    model.pretrained_cfg["label_names"] = CLASSES
    with as_file(files("foveate.data").joinpath("files", "demo_vit.safetensors")) as path:
        model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()
