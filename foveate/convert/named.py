"""Open a model by a name that a user types: a file, a folder, a name in timm or on the hub."""

from __future__ import annotations

import difflib
from pathlib import Path

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from foveate.backbones import set_class_names
from foveate.convert.hub import is_hub_name
from foveate.convert.loading import Settings, open_model
from foveate.convert.shipped import SHIPPED, open_shipped

__all__ = ["check_name", "open_base"]


def open_base(name: str, *, untrained: bool = False) -> nn.Module:
    """Open a model in evaluation mode; if it was saved with a method, it keeps the method.

    Args:
        name: a checkpoint file; a folder that a run, foveate, timm or transformers wrote; a name
            of timm; ``hf-hub:OWNER/NAME``; or one of the small models that ship with the package,
            such as "demo".
        untrained: take a timm model with random weights instead of fetching its own.
    """
    if name in SHIPPED:
        return open_shipped(name)
    if is_hub_name(name) or Path(name).exists():
        return open_model(name, None, None, {}, Settings()).model.eval()
    check_name(name)
    if untrained:
        return timm.create_model(name, pretrained=False).eval()
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the hub, the network and timm raise errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"no weights for {name}: {reason}. Random ones come with --untrained, on the page with "
            "'Random weights', and in Python with a model from timm.create_model"
        ) from error
    _name_imagenet_classes(model)
    return model


def check_name(name: str) -> None:
    """Raise ValueError for a name that timm does not know; it suggests similar names."""
    if ":" in name or not timm.is_model(name):
        near = difflib.get_close_matches(
            name, timm.list_models("*vit*") + timm.list_models("*dei*")
        )
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"{name} is neither a file, a folder nor a model that timm knows (a model on the hub "
            f"is called hf-hub:OWNER/NAME){hint}"
        )


def _name_imagenet_classes(model: nn.Module) -> None:
    """Name the classes of a classifier with timm's own weights, which carry no names.

    timm tells the subset of ImageNet from the number of outputs. With its own weights that is
    right; a model that somebody trained might have 1000 classes of another kind.
    """
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        numbers = range(info.num_classes())
        set_class_names(model, [info.index_to_description(number) for number in numbers])
