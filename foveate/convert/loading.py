"""Load a model from a folder of ours, a Hugging Face folder or a checkpoint file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor, nn

from foveate import api
from foveate.backbones import (
    MultiScaleViT,
    backbone_for,
    class_names,
    from_folder,
    image_settings,
    resize_positions,
    set_class_names,
    set_image_settings,
)
from foveate.convert.beit_geometry import BeitGeometry
from foveate.convert.dense import DENSE, open_dense
from foveate.convert.folders import config_path, open_folder
from foveate.convert.geometry import (
    CLASSES,
    GRID,
    HEADS,
    IMAGES,
    POOL,
    SCALES,
    Geometry,
    resize_note,
)
from foveate.convert.hub import download, is_hub_name
from foveate.convert.origins import FAMILY, ORIGINS, Origin, find_origin, translate
from foveate.convert.parts import run_model
from foveate.convert.read import Checkpoint, read, shorten
from foveate.convert.timm_folder import from_timm_folder, is_timm_folder
from foveate.core import ReducedViT, Reducer
from foveate.facts import image_grid
from foveate.files import write_whole
from foveate.registry import suggest

__all__ = ["Loaded", "Settings", "from_pretrained", "load", "open_model", "save_plain"]

_log = logging.getLogger(__name__)
_Method = str | Reducer | type[Reducer]
_RESIZING = ("image_size", "antialias")  # settings that Hugging Face folders take too


@dataclass(frozen=True)
class Settings:
    """Settings for reading a checkpoint; ``load`` describes them."""

    origin: str | None = None
    num_heads: int | None = None
    image_size: int | tuple[int, int] | None = None
    antialias: bool | None = None
    weights: str = "auto"

    def changed(self) -> list[str]:
        """Return the names of the settings that differ from their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]


@dataclass
class Loaded:
    """A model, the origin of its checkpoint, and notes on what was recognised."""

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
    """Load a model in eval mode from a folder that ``save`` wrote or a checkpoint of others.

    A checkpoint is the folder of a Hugging Face model, or a ``.pth``, ``.pt`` or ``.safetensors``
    file of a plain ViT (timm, DeiT, MAE, BootMAE), BEiT, SimMIM's or ConMIM's ViT, LV-ViT,
    DynamicViT, EViT, Evo-ViT (DeiT) or SViT classifier. Sizes are inferred from its tensors. No
    code in a file is run.

    The path may also be the folder of a training run, or ``hf-hub:OWNER/NAME`` for a model of
    foveate, timm or transformers on the Hugging Face hub (``from_pretrained`` has more options).
    The result is a reduced model if there is a method, otherwise the plain model.

    Args:
        path: the file or folder, or the name on the hub.
        model: model that gets the weights, instead of a new one. Folders that hold only the
            method's own part need it. For files it can have what tensors do not show, such as an
            activation.
        origin: "vit", "mae", "simmim", "bootmae", "conmim", "beit", "lvvit", "dynamicvit", "evit",
            "evovit" or "svit". None infers it from the keys; EViT must be given, as its keys are a
            plain ViT's.
        method: method to run a plain model with, as ``apply`` takes it.
        num_heads: number of heads; None assumes heads of width 64.
        image_size: image size to make the model for; its positions are resized.
        antialias: whether to resize positions with antialiasing. None does what the model's
            library does: timm (files) does; transformers (folders) does for few models.
        weights: "model" or "ema" for files that hold both; "auto" prefers the model's.
        options: options of the method.
    """
    settings = Settings(origin, num_heads, image_size, antialias, weights)
    loaded = open_model(path, model, method, options, settings)
    for note in loaded.notes:
        _log.info("%s: %s", path, note)
    return loaded.model


def from_pretrained(
    repo_id: str,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **settings: Any,
) -> Any:
    """Load a model of foveate, timm or transformers from the Hugging Face hub, in eval mode.

    Only safetensors and JSON are fetched, and no code runs.

    Args:
        repo_id: OWNER/NAME, or OWNER/NAME@REVISION.
        model: backbone for a folder that holds only the method's own part.
        revision: branch, tag or commit; None is the main branch.
        token: access token of the hub; None takes that of the user who is logged in.
        cache_dir: folder to keep files in, instead of the hub's own cache.
        local_files_only: take only what is in the cache already.
        settings: further arguments of ``load``, such as ``method``.
    """
    folder = download(
        repo_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return load(folder, model, **settings)


def open_model(
    path: str | os.PathLike[str],
    model: nn.Module | None,
    method: _Method | None,
    options: Mapping[str, Any],
    settings: Settings,
) -> Loaded:
    """Do what ``load`` does, and return what was recognised too."""
    if isinstance(model, ReducedViT):
        raise ValueError("the model has a method already: call foveate.unwrap(model) first")
    path = download(str(path)) if is_hub_name(path) else run_model(Path(path))
    if not path.is_dir():
        return _from_file(path, model, method, options, settings)
    config = config_path(path)
    foreign = (path / "config.json").is_file() and not config.is_file()
    for name in settings.changed():
        if not foreign or name not in _RESIZING:
            files = "checkpoint files" + " and Hugging Face folders" * (name in _RESIZING)
            raise ValueError(f"{path} is a folder; {name} is for {files}")
    if foreign:
        if model is not None:
            raise ValueError(
                f"{path} is a Hugging Face folder, which has its own model; leave model out"
            )
        if is_timm_folder(path):
            return _from_timm(path, method, options, settings)
        return _from_hugging_face(path, method, options, settings)
    if method is not None or options:
        given = shorten([*["method"] * (method is not None), *options])
        raise ValueError(f"{path} was saved with its method; leave {given} out")
    if config.name == DENSE:
        if model is not None:
            raise ValueError(
                f"{path} holds a detector or segmenter with its own ViT; leave model out"
            )
        return Loaded(open_dense(path), "foveate")
    return Loaded(open_folder(path, model), "foveate")


def _from_timm(
    path: Path, method: _Method | None, options: Mapping[str, Any], settings: Settings
) -> Loaded:
    if settings.changed():
        raise ValueError(
            f"{path} is a folder of timm, which describes its model completely: leave "
            f"{shorten(settings.changed())} out"
        )
    return Loaded(_with_method(from_timm_folder(path), method, options), "timm")


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
            notes.append(resize_note(spec.grid, grid, antialias))
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
    # If the keys match the given model exactly, they need no origin and no translation.
    exact = model is not None and name is None and keys == model.state_dict().keys()
    origin = ORIGINS["vit"] if exact else find_origin(checkpoint, name)
    if origin.method is not None and method is not None:
        raise ValueError(
            f"{path} is a checkpoint of {origin.title}, which has its own method; leave method "
            "out and give that method's options, if any, as keywords"
        )
    state, own = (checkpoint.tensors, {}) if exact else translate(checkpoint, origin)
    geometry = _geometry(checkpoint, state, origin, model)
    new = model is None
    if model is None:
        model = geometry.model(settings.num_heads, settings.image_size, origin.geometry)
    elif settings.num_heads is not None or settings.image_size is not None:
        raise ValueError("num_heads and image_size are the given model's; leave them out")
    elif origin.geometry:
        checkpoint.notes.append(
            f"{origin.title} needs {dict(origin.geometry)}; the given model was not checked for it"
        )
    state = geometry.with_positions(backbone_for(model).spec.grid, settings.antialias is not False)
    what = f"the {type(model).__name__} " + ("of these sizes" if new else "given")
    if new:  # copies, so that the file may change or be deleted
        state = {key: value.contiguous().clone() for key, value in state.items()}
        set_image_settings(model, geometry.image_settings())
        names = geometry.class_names()
        if names is not None:
            set_class_names(model, names)
    _fill(path, what, model, state, assign=new)
    if origin.method is None:
        result: nn.Module = _with_method(model, method, options)
    else:
        result = _own_method(path, origin, model, own, options)
    return Loaded(result, origin.name, checkpoint.notes)


def _geometry(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], origin: Origin, model: nn.Module | None
) -> Geometry:
    """Return the object that infers sizes from tensors of this origin, or of the given model."""
    if origin.form != "beit" and not isinstance(model, Beit):
        return Geometry(checkpoint, state)
    # A given model whose blocks share their position bias keeps sharing it, to go on pre-training.
    shared = getattr(model, "rel_pos_bias", None) is not None
    return BeitGeometry(checkpoint, state, expand=origin.expand and not shared)


def _fill(
    path: Path, what: str, target: nn.Module, state: Mapping[str, Tensor], *, assign: bool = False
) -> None:
    """Give a module its tensors; ValueError names what does not fit before any is changed."""
    shapes = {key: value.shape for key, value in target.state_dict().items()}
    extra = [key for key in state if key not in shapes]
    missing = [key for key in shapes if key not in state]
    if missing or extra:
        words = [f"unexpected {shorten(extra)}"] if extra else []
        words += [f"no {shorten(missing)}"] if missing else []
        raise ValueError(f"{path} has {' and '.join(words)}; expected exactly the keys of {what}")
    for key, shape in shapes.items():
        if state[key].shape != shape:
            raise ValueError(
                f"{path} has {key} of shape {list(state[key].shape)}; expected {list(shape)} as "
                f"in {what}"
            )
        if not state[key].isfinite().all():
            raise ValueError(f"{path} has NaN or infinity in {key}; expected finite numbers")
    target.load_state_dict(dict(state), assign=assign)


def _with_method(model: nn.Module, method: _Method | None, options: Mapping[str, Any]) -> nn.Module:
    """Return a plain model in eval mode, with the method applied if there is one."""
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
    """Return the model with the method that its origin trained it for."""
    assert origin.method is not None
    reduced = api.apply(model, origin.method, **{**origin.options, **options})
    reducer = reduced.reducer
    if origin.modules is not None:
        stages = len({key.split(".")[1] for key in own})
        active = reducer.active_blocks
        if stages != len(active):
            raise ValueError(
                f"{path} has {origin.modules} for {stages} blocks, expected {len(active)} "
                f"for {origin.method} at blocks {list(active)}; say which with blocks="
            )
    _fill(path, f"the method {origin.method}", reducer, own)
    return reduced.eval()


def save_plain(
    model: nn.Module, path: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a plain model as one safetensors file with timm's keys, which ``load`` reads too.

    ``state`` replaces the model's own tensors, for writing them in another form.
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
    if isinstance(model, MultiScaleViT):
        metadata[SCALES] = json.dumps(asdict(model.scales))
    if pool := getattr(model, "global_pool", None):  # without pooling, any head may come later
        metadata[POOL] = str(pool)
    names = class_names(model)
    if names is not None:
        metadata[CLASSES] = json.dumps(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: save_file(tensors, partial, metadata))
