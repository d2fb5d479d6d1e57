"""The public verbs: apply a method to a model, take it off again, describe, save and load."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import foveate.methods  # noqa: F401  (registers every method)
from foveate.backbones import backbone_for
from foveate.core import Backbone, Chain, ReducedViT, Reducer, TokenState, attend
from foveate.core.backbone import BackboneSpec
from foveate.core.cost import plan, total_macs
from foveate.registry import make, method_class, parse

__all__ = ["apply", "check_driven", "describe", "load", "save", "unwrap"]

_log = logging.getLogger(__name__)
_FORMAT = 1
_CONFIG, _WEIGHTS = "foveate.json", "foveate.safetensors"


def apply(
    model: nn.Module, method: str | Reducer | type[Reducer], *, check: bool = True, **options: Any
) -> ReducedViT:
    """Run a vision transformer with a reduction method. The model itself is untouched.

    Args:
        model: a plain ViT of a supported family; its weights are shared, not copied.
        method: a name with options as keywords (``"evit", keep=0.7``), a string
            (``"evit(keep=0.7)"``, ``"evit + tome(r=4, blocks=[11])"``), a class or an instance.
        check: compare driven with native, block by block, before handing the model over. Needs
            one small forward pass; models on the meta device are not checked.
        options: the method's options when ``method`` is a plain name or a class.
    """
    if isinstance(model, ReducedViT):
        raise ValueError("the model is reduced already; foveate.unwrap() it first")
    reducer = _reducer(method, options)
    backbone = backbone_for(model)
    if check:
        check_driven(backbone)
    reducer.build(backbone.spec)
    reference = next(model.parameters())
    reducer.to(device=reference.device)
    if reference.dtype.is_floating_point:
        reducer.to(dtype=reference.dtype)
    if "cls_row" in reducer.needs and not backbone.spec.class_token:
        _log.warning(
            "%s reads class attention and this model has no class token: it uses the attention "
            "each token receives instead, which needs the whole map and is slower",
            reducer.name,
        )
    return ReducedViT(backbone, reducer)


def _reducer(method: str | Reducer | type[Reducer], options: Mapping[str, Any]) -> Reducer:
    if isinstance(method, Reducer):
        if options:
            raise ValueError(f"options {sorted(options)} go into the method's own constructor")
        # A method is bound to one model; a given instance serves as a template.
        return _rebuilt(method)
    if isinstance(method, type) and issubclass(method, Reducer):
        _check_registered(method)
        return make(method.name, options)
    if not isinstance(method, str):
        raise ValueError(f"method must be a name, a class or an instance, got {method!r}")
    if options:
        if not method.isidentifier():
            raise ValueError(f"give options inside {method!r} or as keywords, not both")
        return make(method, options)
    return make(method) if method.isidentifier() else parse(method)


def _rebuilt(method: Reducer) -> Reducer:
    if isinstance(method, Chain):
        return Chain(*(_rebuilt(part) for part in method.members))
    _check_registered(type(method))
    return make(method.name, method.config())


def _check_registered(method: type[Reducer]) -> None:
    """A class is known by its name, so the name must lead back to it."""
    if not method.name or method_class(method.name) is not method:
        raise ValueError(
            f"{method.__name__} is not registered: decorate it with @register(NAME) from "
            "foveate.registry"
        )


def unwrap(model: ReducedViT) -> nn.Module:
    """The model that was given to ``apply``."""
    return _reduced(model).vit


def _reduced(model: object) -> ReducedViT:
    if not isinstance(model, ReducedViT):
        raise ValueError(f"a model from foveate.apply is needed, got {type(model).__name__}")
    return model


# The self-check ----------------------------------------------------------------------------------


@torch.no_grad()
def check_driven(backbone: Backbone) -> None:
    """Refuse a backbone whose driven pass does not equal its native one.

    Logits of an untrained model say nothing: with small LayerScale and heads, leaving out all
    attention would hardly move them. So each block's residual change is compared, relatively, on
    unit-variance tokens; then the embedding and the head.
    """
    model, spec = backbone.model, backbone.spec
    reference = next(model.parameters())
    if reference.is_meta:
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        _compare(backbone, reference)
    finally:
        for module, training in modes:
            module.training = training
    _log.debug("driven %s equals native in all %d blocks", spec.family, spec.depth)


def _compare(backbone: Backbone, reference: Tensor) -> None:
    model, spec = backbone.model, backbone.spec
    # One part in a few hundred in half precision: the same sums in another order.
    tolerance = 1e-3 if reference.dtype in (torch.float32, torch.float64) else 5e-2
    size = [n * p for n, p in zip(spec.grid, spec.patch, strict=True)]
    channels = model.patch_embed.proj.in_channels
    noise = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise).to(reference.device, reference.dtype)

    images = random(1, channels, *size)
    entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append((args, kwargs)), with_kwargs=True
    )
    try:
        native = model(images)
    finally:
        hook.remove()
    if not entered:
        raise ValueError(f"{spec.family}: the model never calls its first block; cannot be driven")
    args, kwargs = entered[0]
    embedded = backbone.embed(images)
    _expect("embedding", embedded.x, args[0], tolerance, spec.family)
    rotary = embedded.table is not None
    for block, stock in enumerate(model.blocks):
        x = random(*args[0].shape)
        state = TokenState.begin(x, prefix=spec.prefix, grid=embedded.grid, place=rotary)
        table = ReducedViT._rotary(block, state, embedded.table)
        heads = backbone.qkv(block, state.x, table)
        middle = state.x + backbone.project(block, attend(heads, state), heads)
        driven = middle + backbone.feedforward(block, middle) - state.x
        if rotary and kwargs.get("rope") is not None and model.rope_mixed:
            tables = model.rope.get_embed(shape=list(embedded.grid))
            kwargs = {**kwargs, "rope": tables[block]}
        change = stock(x, *args[1:], **kwargs) - x
        _expect(f"block {block}", driven.view_as(x), change, tolerance, spec.family)
    tokens = random(*args[0].shape)
    state = TokenState.begin(tokens, prefix=spec.prefix, grid=embedded.grid)
    driven = backbone.head(state.replace(x=backbone.norm(state.x)))
    head = model.forward_head(backbone.norm(tokens))
    _expect("head", driven, head, tolerance, spec.family)
    whole = ReducedViT(backbone, _Nothing())(images)
    _expect("logits", whole, native, 10 * tolerance, spec.family)


class _Nothing(Reducer):
    """Changes nothing."""

    def __init__(self) -> None:
        self.__post_init__()


def _expect(what: str, driven: Tensor, native: Tensor, tolerance: float, family: str) -> None:
    scale = native.float().square().mean().sqrt().clamp_min(1e-12)
    error = (driven.float() - native.float()).square().mean().sqrt() / scale
    if driven.shape != native.shape or not error <= tolerance:
        raise ValueError(
            f"this {family} cannot be driven: its {what} differs from the model's own by "
            f"{float(error):.1e} relatively (at most {tolerance:.0e} is rounding). Supported are "
            "plain pre-norm vision transformers with global attention; hooks or parametrisations "
            "that change a block's output must be removed first"
        )


# Describing --------------------------------------------------------------------------------------


def describe(model: ReducedViT, image_size: int | tuple[int, int] | None = None) -> str:
    """One screen of facts: the method, tokens per block, multiply-adds, training.

    Args:
        model: a model from ``apply``.
        image_size: other than the model's own.
    """
    spec, reducer = _reduced(model).backbone.spec, model.reducer
    grid = spec.grid if image_size is None else _grid(image_size, spec.patch)
    blocks = plan(spec, reducer, grid)
    dense, reduced = (total_macs(spec, r, grid) / 1e9 for r in (None, reducer))
    fixed = reducer.fixed_count
    new = sum(p.numel() for p in reducer.parameters())
    attention = "fused"
    if "attention" in reducer.needs or ("cls_row" in reducer.needs and not spec.class_token):
        attention = "fused, and the whole map beside it where scores are read"
    elif "cls_row" in reducer.needs:
        attention = "fused, and one row beside it where scores are read"
    lines = [
        f"{reducer!r} on {spec.family}, width {spec.width}, depth {spec.depth}, "
        f"{grid[0]} x {grid[1]} patches, {spec.prefix} prefix token{'s' * (spec.prefix != 1)}",
        f"tokens per block: {' '.join(str(b.fed) for b in blocks)}"
        + ("" if fixed else "  (expected or at most: each image has its own count)"),
        f"GMACs: {reduced:.{_digits(reduced)}f} of {dense:.{_digits(dense)}f} "
        f"({reduced / dense:.0%}){'' if fixed else ', at those counts'}; scoring not counted",
        f"attention: {attention}",
        f"training: {reducer.training_need}"
        + (f" (losses beside the task: {', '.join(_losses(reducer))})" if _losses(reducer) else ""),
        f"new parameters: {new:,}",
        f"modes: {', '.join(_modes(reducer))}",
    ]
    return "\n".join(lines)


def _digits(value: float) -> int:
    return 2 if value >= 0.1 else 4


def _losses(reducer: Reducer) -> list[str]:
    return [
        f"{name} x {weight:g}"
        for part in reducer.members
        for name, weight in part.loss_weights.items()
    ]


def _modes(reducer: Reducer) -> list[str]:
    modes = ["gathered", "packed"] if reducer.fixed_count else ["packed"]
    if reducer.maskable:
        modes.append("masked")
    return modes


def _grid(image_size: int | tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"image_size must be one or two whole numbers, got {image_size!r}")
    for size, side in zip(sizes, patch, strict=True):
        if size <= 0 or size % side:
            raise ValueError(f"image size {size} is not a multiple of the patch's {side}")
    return sizes[0] // patch[0], sizes[1] // patch[1]


# Saving and loading ------------------------------------------------------------------------------


def save(model: ReducedViT, folder: str | os.PathLike[str], *, everything: bool = False) -> None:
    """Write a model's method and its parameters to a folder: safetensors and JSON.

    Args:
        model: a model from ``apply``.
        folder: made if missing.
        everything: the backbone's weights too, not only what the method added.
    """
    folder, model = Path(folder), _reduced(model)
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
        "foveate": _version(),
        "methods": [
            {"name": part.name, "options": _plain(part.config())} for part in model.reducer.members
        ],
        "mode": model.mode,
        "backbone": {
            "family": spec.family,
            "width": spec.width,
            "depth": spec.depth,
            "heads": spec.heads,
            "classes": spec.classes,
            "prefix": spec.prefix,
        },
        "timm": _timm_recipe(unwrap(model)) if everything else None,
        "everything": everything,
    }
    _write(folder / _WEIGHTS, lambda path: save_file(tensors, path))
    text = json.dumps(config, indent=2) + "\n"
    _write(folder / _CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> ReducedViT:
    """Read what ``save`` wrote.

    Args:
        folder: the folder.
        model: the backbone to apply the method to. May be left out when everything was saved
            from a model that ``timm.create_model`` made.
    """
    folder = Path(folder)
    config, tensors = _read_config(folder), _read_tensors(folder / _WEIGHTS)
    if model is None:
        model = _rebuild(folder, config)
    parts = [make(part["name"], part["options"]) for part in config["methods"]]
    reduced = apply(model, parts[0] if len(parts) == 1 else Chain(*parts), check=False)
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
        raise ValueError(f"{folder / _WEIGHTS} does not fit: missing {missing}, unexpected {extra}")
    for name, value in reduced.state_dict().items():
        if name in tensors and tensors[name].shape != value.shape:
            raise ValueError(
                f"{folder / _WEIGHTS} does not fit: {name} has shape {list(tensors[name].shape)}, "
                f"the model's is {list(value.shape)}"
            )
    reduced.load_state_dict(tensors, strict=False)
    reduced.mode = config["mode"]
    check_driven(reduced.backbone)
    return reduced


def _version() -> str:
    try:
        return importlib.metadata.version("foveate")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+source"


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _write(path: Path, write: Any) -> None:
    """Write to a neighbour and rename, so that a killed run leaves no half file."""
    partial = path.with_name(path.name + ".partial")
    write(str(partial))
    os.replace(partial, path)


def _timm_recipe(model: Any) -> dict[str, Any] | None:
    """How timm builds the model again, or None where that is not known."""
    import timm

    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not name:
        return None
    arguments = {
        **getattr(model, "_model_args", {}),
        # These may have been changed since.
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "img_size": list(model.patch_embed.img_size),
    }
    try:
        json.dumps(arguments)
        with torch.device("meta"):
            twin = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, RuntimeError, ValueError) as error:
        _log.warning("the model cannot be rebuilt from its name %s: %s", name, error)
        return None
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if shapes != {key: value.shape for key, value in twin.state_dict().items()}:
        _log.warning("the model differs from timm's %s; loading will need a model", name)
        return None
    return {"name": name, "arguments": arguments}


def _rebuild(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    import timm

    recipe = config.get("timm")
    if not config["everything"] or recipe is None:
        why = (
            "the backbone was not built by timm.create_model, so it cannot be rebuilt"
            if config["everything"]
            else "only the method's own parameters were saved"
        )
        raise ValueError(f"{folder}: {why}; pass the backbone as load(folder, model)")
    name = recipe["name"]
    # Only timm's own constructors: a prefixed name would make timm fetch or read elsewhere.
    if not timm.is_model(name) or "pretrained" in recipe["arguments"]:
        raise ValueError(f"{folder}: this timm knows no model {name!r} to rebuild")
    try:
        return timm.create_model(name, pretrained=False, **recipe["arguments"])
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{folder}: {name} cannot be rebuilt: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} holds no {_CONFIG}: not a folder that foveate.save wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} has format {found!r}; this version reads {_FORMAT}")
    _check_config(path, config)
    return config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a file whose fields are not what ``save`` writes."""
    fields: dict[str, type | tuple[type, ...]] = {
        "methods": list,
        "mode": str,
        "backbone": dict,
        "everything": bool,
        "timm": (dict, type(None)),
    }
    for key, kind in fields.items():
        if key not in config or not isinstance(config[key], kind):
            raise ValueError(f"{path} is not what foveate.save writes: see its field {key!r}")
    unknown = set(config["backbone"]) - {f.name for f in dataclasses.fields(BackboneSpec)}
    if unknown:
        raise ValueError(f"{path} names unknown facts of a backbone: {sorted(unknown)}")
    recipe = config["timm"]
    if recipe is not None and not (
        isinstance(recipe.get("name"), str) and isinstance(recipe.get("arguments"), dict)
    ):
        raise ValueError(f"{path} is not what foveate.save writes: see its field 'timm'")
    for part in config["methods"]:
        good = isinstance(part, dict) and isinstance(part.get("options"), dict)
        if not good or not isinstance(part.get("name"), str):
            raise ValueError(f"{path} is not what foveate.save writes: see its field 'methods'")
        method_class(part["name"])
    if not config["methods"]:
        raise ValueError(f"{path} names no method")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
