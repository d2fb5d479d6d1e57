"""One door for everything that can be loaded: our folders, Hugging Face folders, checkpoints."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor, nn

from foveate import api
from foveate.backbones import (
    backbone_for,
    from_folder,
    image_settings,
    resize_positions,
    set_image_settings,
)
from foveate.convert.beit_geometry import BeitGeometry
from foveate.convert.folders import CONFIG, open_folder
from foveate.convert.geometry import GRID, HEADS, IMAGES, POOL, Geometry, resized
from foveate.convert.origins import FAMILY, ORIGINS, Origin, find, translate
from foveate.convert.read import Checkpoint, few, read
from foveate.core import ReducedViT, Reducer
from foveate.facts import image_grid
from foveate.files import write_whole
from foveate.registry import suggest

__all__ = ["Loaded", "Settings", "load", "open_model", "save_plain"]

_log = logging.getLogger(__name__)
_Method = str | Reducer | type[Reducer]
_RESIZING = ("image_size", "antialias")  # settings that Hugging Face folders take too


@dataclass(frozen=True)
class Settings:
    """How to read a checkpoint file; see ``load``."""

    origin: str | None = None
    num_heads: int | None = None
    image_size: int | tuple[int, int] | None = None
    antialias: bool | None = None
    weights: str = "auto"

    def changed(self) -> list[str]:
        """Names of what is not at its default."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]


@dataclass
class Loaded:
    """A model, whose checkpoint it was, and what was understood on the way."""

    model: nn.Module
    origin: str
    notes: list[str] = field(default_factory=list)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    origin: str | None = None,
    method: _Method | None = None,
    num_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    antialias: bool | None = None,
    weights: str = "auto",
    **options: Any,
) -> Any:
    """Load a model, ready to run: a folder that ``save`` wrote, or a checkpoint of others.

    The folder of a training run of ours stands for the model in it. A checkpoint is a ``.pth``,
    ``.pt`` or ``.safetensors`` file of a plain ViT (timm, DeiT, MAE), BEiT, SimMIM's ViT, LV-ViT,
    DynamicViT, EViT, Evo-ViT (DeiT) or SViT classifier, or the folder of a Hugging Face model.
    Sizes are read off its tensors. No code in a file is run.

    Gives a reduced model, in eval mode, where there is a method and else the model itself.

    Args:
        path: the file or folder.
        model: gets the weights instead of a new model. A folder that holds the method's own part
            alone needs it; for files it says what tensors do not show, such as an activation.
        origin: "vit", "mae", "simmim", "beit", "lvvit", "dynamicvit", "evit", "evovit" or "svit".
            None reads it off the keys, which EViT's do not tell from a plain ViT's.
        method: runs a plain model with this method, as ``apply`` takes it.
        num_heads: where heads are not 64 wide.
        image_size: makes the model for another size and resizes its positions.
        antialias: whether to resize positions with antialiasing. None does what the model's
            library does: timm does it for files, and transformers for few folders.
        weights: "model" or "ema" where a file has both; "auto" prefers the model's.
        options: of the method.
    """
    settings = Settings(origin, num_heads, image_size, antialias, weights)
    loaded = open_model(path, model, method, options, settings)
    for note in loaded.notes:
        _log.info("%s: %s", path, note)
    return loaded.model


def open_model(
    path: str | os.PathLike[str],
    model: nn.Module | None,
    method: _Method | None,
    options: Mapping[str, Any],
    settings: Settings,
) -> Loaded:
    """As ``load``, and what was recognised."""
    path = _run_folder(Path(path))
    if isinstance(model, ReducedViT):
        raise ValueError("the model is reduced already; foveate.unwrap() it first")
    if not path.is_dir():
        return _from_file(path, model, method, options, settings)
    foreign = (path / "config.json").is_file() and not (path / CONFIG).is_file()
    for name in settings.changed():
        if not foreign or name not in _RESIZING:
            files = "checkpoint files" + " and Hugging Face folders" * (name in _RESIZING)
            raise ValueError(f"{path} is a folder; {name} is for {files}")
    if foreign:
        if model is not None:
            raise ValueError(f"{path} is a Hugging Face folder with its own model; pass no other")
        return _from_hugging_face(path, method, options, settings)
    if method is not None or options:
        given = few([*["method"] * (method is not None), *options])
        raise ValueError(f"{path} was saved with its method; {given} cannot be given again")
    return Loaded(open_folder(path, model), "foveate")


def _run_folder(path: Path) -> Path:
    """What a training run exported, if the path is the run's folder."""
    if (path / "recipe.yaml").is_file():
        for name in ("model.safetensors", "model"):
            if (path / name).exists():
                return path / name
        raise ValueError(f"{path} is a run that has not finished: it holds no model yet")
    return path


def _from_hugging_face(
    path: Path, method: _Method | None, options: Mapping[str, Any], settings: Settings
) -> Loaded:
    if settings.antialias is not None and settings.image_size is None:
        raise ValueError("antialias says how to resize positions; give image_size with it")
    model, notes = from_folder(path), []
    if settings.image_size is not None:
        spec = backbone_for(model).spec
        grid = image_grid(settings.image_size, spec.patch)
        if grid != spec.grid:
            antialias = resize_positions(model, grid, settings.antialias)
            notes.append(resized(spec.grid, grid, antialias))
    return Loaded(_with_method(model, method, options), "hugging face", notes)


def _from_file(
    path: Path,
    model: nn.Module | None,
    method: _Method | None,
    options: Mapping[str, Any],
    settings: Settings,
) -> Loaded:
    checkpoint = read(path, settings.weights)
    name, keys = settings.origin, checkpoint.tensors.keys()
    # A model whose very keys these are settles whose they are, for families of other keys too.
    exact = model is not None and name is None and keys == model.state_dict().keys()
    origin = ORIGINS["vit"] if exact else find(checkpoint, name)
    if origin.method is not None and method is not None:
        raise ValueError(
            f"{path} is a checkpoint of {origin.title}, which has its method; expected options of "
            "it as keywords, or none"
        )
    state, own = (checkpoint.tensors, {}) if exact else translate(checkpoint, origin)
    geometry = _geometry(checkpoint, state, origin, model)
    new = model is None
    if model is None:
        model = geometry.model(settings.num_heads, settings.image_size, origin.geometry)
    elif settings.num_heads is not None or settings.image_size is not None:
        raise ValueError("num_heads and image_size are the given model's own; leave them out")
    elif origin.geometry:
        checkpoint.notes.append(
            f"{origin.title} has {dict(origin.geometry)}; the model is not asked"
        )
    state = geometry.placed(backbone_for(model).spec.grid, settings.antialias is not False)
    what = f"the {type(model).__name__} " + ("that its sizes describe" if new else "given")
    if new:  # copies, so that the file may change or go
        state = {key: value.contiguous().clone() for key, value in state.items()}
        set_image_settings(model, geometry.images())
    _fill(path, what, model, state, assign=new)
    if origin.method is None:
        result: nn.Module = _with_method(model, method, options)
    else:
        result = _own_method(path, origin, model, own, options)
    return Loaded(result, origin.name, checkpoint.notes)


def _geometry(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], origin: Origin, model: nn.Module | None
) -> Geometry:
    """What reads sizes off the tensors of such a model, which may be given."""
    if origin.form != "beit" and not isinstance(model, Beit):
        return Geometry(checkpoint, state)
    # Who gives a model whose blocks share their position bias goes on with pre-training.
    shared = getattr(model, "rel_pos_bias", None) is not None
    return BeitGeometry(checkpoint, state, expand=origin.expand and not shared)


def _fill(
    path: Path, what: str, target: nn.Module, state: Mapping[str, Tensor], *, assign: bool = False
) -> None:
    """Give a module its tensors; ValueError naming what does not fit before any is changed."""
    shapes = {key: value.shape for key, value in target.state_dict().items()}
    extra = [key for key in state if key not in shapes]
    missing = [key for key in shapes if key not in state]
    if missing or extra:
        words = [f"{few(extra)} too many"] * bool(extra) + [f"no {few(missing)}"] * bool(missing)
        raise ValueError(f"{path} has {' and '.join(words)}; expected exactly the keys of {what}")
    for key, shape in shapes.items():
        if state[key].shape != shape:
            raise ValueError(
                f"{path} has {key} of shape {list(state[key].shape)}; expected {list(shape)} as "
                f"in {what}"
            )
        if not state[key].isfinite().all():
            raise ValueError(f"{path} has values in {key} that are not finite; expected numbers")
    target.load_state_dict(dict(state), assign=assign)


def _with_method(model: nn.Module, method: _Method | None, options: Mapping[str, Any]) -> nn.Module:
    """A plain model in eval mode, with a method if there is one."""
    model.eval()
    if method is not None:
        return api.apply(model, method, **options).eval()
    if options:
        names = ["method", *(f.name for f in fields(Settings))]
        raise ValueError(
            f"{suggest('keyword', min(options), names)}. Options of a method need method=, or an "
            "origin= that has one"
        )
    api.check_driven(backbone_for(model))
    return model


def _own_method(
    path: Path,
    origin: Origin,
    model: nn.Module,
    own: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> ReducedViT:
    """The model with the method that its origin trained it for."""
    assert origin.method is not None
    reduced = api.apply(model, origin.method, **{**origin.options, **options})
    reducer = reduced.reducer
    if origin.modules is not None:
        stages = len({key.split(".")[1] for key in own})
        if stages != len(reducer.acts):
            raise ValueError(
                f"{path} has {origin.modules} for {stages} blocks, expected {len(reducer.acts)} "
                f"for {origin.method} at blocks {list(reducer.acts)}; say which with blocks="
            )
    _fill(path, f"the method {origin.method}", reducer, own)
    return reduced.eval()


def save_plain(
    model: nn.Module, path: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a plain model as one safetensors file with timm's keys, that ``load`` reads too.

    ``state`` takes the place of its own tensors, where another form of them is to be written.
    """
    path, spec = Path(path), backbone_for(model).spec
    state = model.state_dict() if state is None else state
    tensors = {name: value.contiguous() for name, value in state.items()}
    metadata = {
        "format": "pt",
        FAMILY: spec.family,
        HEADS: str(spec.heads),
        GRID: f"{spec.grid[0]}x{spec.grid[1]}",
        IMAGES: json.dumps(image_settings(model)),
    }
    if pool := getattr(model, "global_pool", None):  # what pools nothing yet may get any head
        metadata[POOL] = str(pool)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: save_file(tensors, partial, metadata))
