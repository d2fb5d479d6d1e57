"""Save and open folders of detectors and segmenters: weights, and all that makes them again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from foveate.api import apply
from foveate.backbones import image_settings, rebuild, set_image_settings
from foveate.convert.about import about
from foveate.convert.card import write_card
from foveate.convert.parts import Fields, listed, made, read_config, read_tensors, version
from foveate.convert.record import drop_record
from foveate.dense import DenseModel, make_dense
from foveate.files import write_text, write_whole

__all__ = ["DENSE", "DENSE_WEIGHTS", "open_dense", "save_dense"]

DENSE = "dense.json"  # its presence tells such a folder from others
DENSE_WEIGHTS = "dense.safetensors"
_FORMAT = 1
_FIELDS: Fields = {
    **{"methods": list, "mode": str, "family": str, "vit": dict, "images": dict},
    **{"class_names": list, "backbone": dict, "head": dict, "image_size": (list, type(None))},
}


def save_dense(
    model: DenseModel, folder: str | os.PathLike[str], license: str | None = None
) -> None:
    """Write a detector or a segmenter with its method to a folder: safetensors and JSON."""
    reduced, folder = model.reduced, Path(folder)
    recipe = reduced.backbone.recipe()
    if not model.settings:
        raise ValueError(
            f"this {type(model).__name__} was put together by hand, so it cannot be made again "
            "from a folder: make it with foveate.dense.make_dense, or save its state_dict()"
        )
    if recipe is None:
        raise ValueError(
            f"the {type(reduced.vit).__name__} inside cannot be made again from plain data: save "
            "the model's state_dict()"
        )
    config = {
        "format": _FORMAT,
        "foveate": version(),
        "methods": listed(part for part in reduced.reducer.members if part.name != "dense"),
        "mode": reduced.mode,
        "family": reduced.backbone.spec.family,
        "vit": recipe,
        "images": image_settings(reduced.vit),
        "class_names": list(model.class_names),
        **model.settings,
        "about": about(model, license),
    }
    tensors = {
        name: value.detach().contiguous().clone() for name, value in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    drop_record(folder)
    write_whole(folder / DENSE_WEIGHTS, lambda path: save_file(tensors, path))
    write_text(folder / DENSE, json.dumps(config, indent=2) + "\n")
    write_card(folder, config)


def open_dense(folder: Path) -> DenseModel:
    """Open what ``save_dense`` wrote, in evaluation mode."""
    path = folder / DENSE
    absent = f"{folder} holds no {DENSE}: not a detector or segmenter of foveate"
    config = read_config(path, absent, _FORMAT, _FIELDS)
    size = config["image_size"]
    try:
        vit = rebuild(config["family"], config["vit"])
        set_image_settings(vit, config["images"])
        model = make_dense(
            vit,
            config["class_names"],
            config["backbone"],
            config["head"],
            None if size is None else (int(size[0]), int(size[1])),
        )
        if config["methods"]:
            model = apply(model, made(config["methods"]), check=False)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} cannot be made again: {error}") from error
    model.reduced.mode = config["mode"]
    tensors = read_tensors(folder / DENSE_WEIGHTS)
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{folder / DENSE_WEIGHTS} has NaN or infinity in {name}")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / DENSE_WEIGHTS} does not fit {path}: {' '.join(str(error).split())}"
        ) from None
    return model.eval()
