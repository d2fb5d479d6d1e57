"""Build detectors and segmenters from plain settings, as recipes and saved folders hold them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN

from foveate.dense.backbone import DenseModel, windowed
from foveate.dense.detectors import faster_rcnn, mask_rcnn
from foveate.dense.segmenters import segmenter
from foveate.dense.simple_pyramid import pyramid
from foveate.dense.vit_adapter import adapter
from foveate.registry import suggest

__all__ = ["BACKBONES", "DETECTORS", "SEGMENTERS", "check_part", "make_dense"]

BACKBONES: dict[str, Callable[..., Any]] = {"adapter": adapter, "pyramid": pyramid}
DETECTORS: dict[str, Callable[..., Any]] = {"mask_rcnn": mask_rcnn, "faster_rcnn": faster_rcnn}
SEGMENTERS: dict[str, Callable[..., Any]] = {
    "fpn": partial(segmenter, head="fpn"),
    "upernet": partial(segmenter, head="upernet"),
}
_HEADS = {**DETECTORS, **SEGMENTERS}
_NOT_OPTIONS = ("vit", "num_classes", "image_size", "head", "options")  # set elsewhere
_PASSED = ("rpn_", "box_")  # torchvision's own settings of proposals and boxes
_WINDOWS = "windows"


def make_dense(
    vit: nn.Module,
    class_names: Sequence[str],
    backbone: Mapping[str, Any],
    head: Mapping[str, Any],
    image_size: tuple[int, int] | None,
) -> DenseModel:
    """Make a detector or a segmenter that can be saved and built again.

    Args:
        vit: a plain ViT.
        class_names: one name for each class.
        backbone: "name" ("adapter" or "pyramid") and options of that function; "windows" ({} or
            options of ``windowed``) makes the dense ViT attend in windows.
        head: "name" ("mask_rcnn", "faster_rcnn", "fpn" or "upernet") and options of
            ``mask_rcnn``, ``faster_rcnn`` or ``segmenter``.
        image_size: length of the shorter side of an image after resizing, and the largest length of
            its longer side; None leaves images as they are.
    """
    check_part("backbone", backbone, BACKBONES)
    check_part("head", head, _HEADS)
    settings = {
        "backbone": dict(backbone),
        "head": dict(head),
        "image_size": None if image_size is None else list(image_size),
    }
    windows = backbone.get(_WINDOWS)
    body = BACKBONES[backbone["name"]](
        vit if windows is None else windowed(vit, **windows), **_options(backbone)
    )
    model: DenseModel = _HEADS[head["name"]](
        body, len(class_names), image_size=image_size, **_options(head)
    )
    model.class_names, model.settings = tuple(class_names), settings
    return model


def check_part(
    what: str, given: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]
) -> None:
    """Raise ValueError for an unknown name, or for an option that its function does not take.

    Args:
        what: the setting, for messages.
        given: the "name" and options.
        known: functions by name.
    """
    name = str(given.get("name"))
    if name not in known:
        raise ValueError(suggest(f"{what}.name", name, list(known)))
    legal = [one for one in inspect.signature(known[name]).parameters if one not in _NOT_OPTIONS]
    legal += [_WINDOWS] if name in BACKBONES else []
    if name in DETECTORS:  # they pass further options on to torchvision
        legal += [one for one in inspect.signature(FasterRCNN).parameters if one[:4] in _PASSED]
    for option in given:
        if option != "name" and option not in legal:
            raise ValueError(suggest(f"option of {what}.name={name}", option, legal))


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the function; lists of YAML and JSON become tuples."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in given.items()
        if key not in ("name", _WINDOWS)
    }
