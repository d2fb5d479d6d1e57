"""Save and open folders of reduced models: the method and, if asked, the backbone's weights."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from foveate.api import apply, check_driven, unwrap
from foveate.backbones import (
    class_names,
    image_settings,
    rebuild,
    set_class_names,
    set_image_settings,
)
from foveate.convert.about import about
from foveate.convert.card import model_name, with_facts, write_card
from foveate.convert.dense import DENSE, save_dense
from foveate.convert.parts import Fields, listed, made, read_config, read_tensors, version
from foveate.convert.record import add_measured, drop_record, write_record
from foveate.convert.results import read_results
from foveate.core import ReducedViT
from foveate.core.backbone import BackboneSpec
from foveate.dense import DenseModel
from foveate.files import read_json, write_text, write_whole
from foveate.registry import method_class

__all__ = [
    *("CONFIG", "WEIGHTS", "config_path", "note_measured", "note_results", "note_run"),
    *("open_folder", "save"),
]

CONFIG = "foveate.json"  # its presence tells such a folder from others
WEIGHTS = "foveate.safetensors"
_FORMAT = 1
_FIELDS: Fields = {
    **{"methods": list, "mode": str, "backbone": dict, "everything": bool},
    "model": (dict, type(None)),
}


def save(
    model: ReducedViT | DenseModel,
    folder: str | os.PathLike[str],
    *,
    everything: bool = False,
    license: str | None = None,
) -> None:
    """Write a model's method and the method's parameters to a folder: safetensors and JSON.

    It also writes a model card, README.md, with what was counted. A card that somebody changed is
    kept, with a warning.

    Args:
        model: a model from ``apply``; or a detector or segmenter, which is always written whole.
        folder: folder to write, made if it is missing.
        everything: write the backbone's weights too, so that the folder loads without a model.
        license: name of the model's licence for the card, as the hub writes it: "apache-2.0".
    """
    folder = Path(folder)
    if isinstance(model, DenseModel):
        if (folder / CONFIG).exists():
            raise ValueError(f"{folder} holds a model with a method already; give another folder")
        save_dense(model, folder, license)
        return
    vit = unwrap(model)
    if (folder / DENSE).exists():
        raise ValueError(f"{folder} holds a detector or segmenter already; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = ("reducer.", "vit.") if everything else ("reducer.",)
    tensors = {
        name: value.detach().contiguous().clone()
        for name, value in model.state_dict().items()
        if name.startswith(prefixes)
    }
    spec = model.backbone.spec
    config = {
        "format": _FORMAT,
        "foveate": version(),
        "methods": listed(model.reducer.members),
        "mode": model.mode,
        "backbone": {
            "family": spec.family,
            "width": spec.width,
            "depth": spec.depth,
            "heads": spec.heads,
            "classes": spec.classes,
            "prefix": spec.prefix,
        },
        "model": model.backbone.recipe() if everything else None,
        "images": image_settings(vit) if everything else {},
        "class_names": class_names(vit) if everything else None,
        "everything": everything,
        "about": about(model, license),
    }
    drop_record(folder)
    write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_card(folder, config)


def config_path(folder: Path) -> Path:
    """Return the file that describes a saved model; it is missing if the folder holds none."""
    return folder / (DENSE if (folder / DENSE).is_file() else CONFIG)


def note_run(
    folder: Path,
    recipe: Mapping[str, Any],
    result: Mapping[str, Any],
    scores: Mapping[str, float],
    *,
    weights: str,
) -> None:
    """Add the record of its run to a saved model, and write the card again.

    A folder that ``save`` did not write stays as it is. Arguments are those of ``write_record``.
    """
    path = config_path(folder)
    if path.is_file():
        write_record(folder, recipe, result, scores, weights=weights)
        write_card(folder, read_json(path, f"{path} does not exist"))


def note_results(folder: Path, results: Path) -> None:
    """Put what ``foveate eval`` measured of a saved model into its record and on its card.

    Args:
        folder: the model's folder.
        results: the folder that ``foveate eval --out`` wrote.
    """
    about = with_facts(folder, _config(folder))["about"]
    note_measured(folder, read_results(results, about["method"], model_name(folder)))


def note_measured(folder: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Put measurements of a saved model into its record and on its card."""
    add_measured(folder, found)
    write_card(folder, _config(folder))


def _config(folder: Path) -> dict[str, Any]:
    absent = f"{folder} holds no {CONFIG}: not what foveate.save wrote"
    found: dict[str, Any] = read_json(config_path(folder), absent)
    return found


def open_folder(folder: Path, model: nn.Module | None = None) -> ReducedViT:
    """Load the model in a folder that ``save`` wrote, in evaluation mode.

    Args:
        folder: the folder.
        model: the backbone. It may be left out if everything was saved and the backbone is a timm
            or Hugging Face model that can be made again.
    """
    config, tensors = _read_config(folder), read_tensors(folder / WEIGHTS)
    if model is None:
        model = _rebuild(folder, config)
    reduced = apply(model, made(config["methods"]), check=False)
    spec = reduced.backbone.spec
    for key, value in config["backbone"].items():
        if getattr(spec, key) != value and not (key == "classes" and not config["everything"]):
            raise ValueError(
                f"{folder} was saved for {key} {value}, the given model has {getattr(spec, key)}"
            )
    expected = {
        name for name in reduced.state_dict() if config["everything"] or name.startswith("reducer.")
    }
    missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or extra:
        raise ValueError(f"{folder / WEIGHTS} does not fit: missing {missing}, unexpected {extra}")
    for name, value in reduced.state_dict().items():
        if name in tensors and tensors[name].shape != value.shape:
            raise ValueError(
                f"{folder / WEIGHTS} does not fit: {name} has shape {list(tensors[name].shape)}, "
                f"the model's is {list(value.shape)}"
            )
    reduced.load_state_dict(tensors, strict=False)
    reduced.mode = config["mode"]
    check_driven(reduced.backbone)
    return reduced.eval()


def _rebuild(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    recipe = config["model"]
    if not config["everything"] or recipe is None:
        why = (
            "the backbone cannot be made again from plain data"
            if config["everything"]
            else "only the method's own parameters were saved"
        )
        raise ValueError(f"{folder}: {why}; pass the backbone as load(folder, model)")
    try:
        model = rebuild(config["backbone"]["family"], recipe)
        if config.get("class_names") is not None:
            set_class_names(model, config["class_names"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from error
    if config.get("images"):
        set_image_settings(model, config["images"])
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """Read what ``save`` wrote about a model; ValueError if it cannot have written it."""
    path = folder / CONFIG
    absent = f"{folder} holds no {CONFIG}: not a folder that foveate.save wrote"
    config = read_config(path, absent, _FORMAT, _FIELDS)
    unknown = set(config["backbone"]) - {f.name for f in dataclasses.fields(BackboneSpec)}
    if unknown:
        raise ValueError(f"{path} names unknown facts of a backbone: {sorted(unknown)}")
    for part in config["methods"]:
        good = isinstance(part, dict) and isinstance(part.get("options"), dict)
        if not good or not isinstance(part.get("name"), str):
            raise ValueError(f"{path} is not what foveate.save writes: see its field 'methods'")
        method_class(part["name"])
    names = config.get("class_names")  # folders of earlier versions have none
    if names is not None and not isinstance(names, list):
        raise ValueError(f"{path} is not what foveate.save writes: see its field 'class_names'")
    if not config["methods"]:
        raise ValueError(f"{path} names no method")
    return config
