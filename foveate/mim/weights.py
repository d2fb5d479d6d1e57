"""Files of pre-trained weights: the backbone in timm's form, and the rest beside it.

NAME.safetensors          the backbone, for timm.create_model, foveate.load and foveate finetune
NAME.pretrain.safetensors mask token, decoder or head; the method and its options in the metadata
teacher.safetensors       the backbone of a run's teacher, if its method has one
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.backbones import TimmBeit, expand_position_bias, shared_position_bias
from foveate.backbones.timm_beit import SHARED_BIAS
from foveate.convert import save_plain
from foveate.files import write_whole
from foveate.mim.method import MaskedImageModel

__all__ = [
    "TEACHER_FILE",
    "fill",
    "load_rest",
    "load_weights",
    "method_of",
    "options_of",
    "rest_path",
    "save_model",
    "save_vit",
]

TEACHER_FILE = "teacher.safetensors"


def rest_path(path: Path) -> Path:
    """Return the path of the rest that belongs to a backbone's file."""
    return path.with_suffix(".pretrain.safetensors")


def save_vit(model: MaskedImageModel, path: Path) -> None:
    """Write the backbone's file.

    A relative position bias that blocks share is written once for each of them: so timm's BEiT
    models have it, and so it is fine-tuned.
    """
    state: dict[str, Tensor] = dict(model.vit.state_dict())
    if SHARED_BIAS in state:
        state = expand_position_bias(state, model.backbone.spec.depth)
    save_plain(model.vit, path, state)


def save_model(model: MaskedImageModel, path: Path) -> None:
    """Write both files."""
    if model.options is None:
        raise ValueError(
            f"this {type(model).__name__} does not know its options, which its file has to say: "
            "make it with foveate.mim.make_method"
        )
    save_vit(model, path)
    rest = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("vit.")
    }
    said = {"format": "pt", "method": model.name, "options": json.dumps(model.options)}
    write_whole(rest_path(path), lambda partial: save_file(rest, partial, said))


def method_of(path: Path) -> str:
    """Return the method that pre-trained a backbone's file."""
    return _about(path)[0]


def options_of(path: Path) -> dict[str, Any]:
    """Return the options that the method was made with."""
    return dict(json.loads(_about(path)[1]))


def _about(path: Path) -> tuple[str, str]:
    with safe_open(rest_path(path), "pt") as added:
        said = added.metadata() or {}
    if not {"method", "options"} <= said.keys():
        raise ValueError(f"{rest_path(path)} does not say by what method it was pre-trained")
    return said["method"], said["options"]


def load_rest(model: MaskedImageModel, path: Path) -> None:
    """Fill a method's own weights, and leave its ViT as it is."""
    fill(model, model.vit.state_dict(), load_file(rest_path(path)), path)


def load_weights(model: MaskedImageModel, path: Path) -> None:
    """Fill a method and its ViT from both files."""
    rest = rest_path(path)
    for file in (path, rest):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; {path} needs both of its files to go on with")
    if (said := method_of(path)) != model.name:
        raise ValueError(f"{rest} is of the method {said}, not of {model.name}")
    vit = load_file(path)
    if isinstance(model.backbone, TimmBeit) and SHARED_BIAS in model.vit.state_dict():
        vit = shared_position_bias(vit)
    fill(model, vit, load_file(rest), path)


def fill(model: nn.Module, vit: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    """Give a method the tensors of its ViT and its own; ValueError where they do not fit."""
    state = {**{f"vit.{name}": value for name, value in vit.items()}, **own}
    wanted = model.state_dict()
    for name in sorted(wanted.keys() ^ state.keys()):
        raise ValueError(f"{path} {'lacks' if name in wanted else 'has no place for'} {name}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            shape = list(wanted[name].shape)
            raise ValueError(f"{path} has {name} of shape {list(value.shape)}, expected {shape}")
    model.load_state_dict(state)
