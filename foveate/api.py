"""Apply a method to a model, and remove it again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

import foveate.methods  # noqa: F401  (registers every method)
from foveate.backbones import SUPPORTED, backbone_for
from foveate.core import Backbone, Chain, ReducedViT, Reducer, dense
from foveate.core.budget import solve_budget
from foveate.core.evaluation import evaluating
from foveate.latency import is_time, solve_time_budget
from foveate.registry import make, method_class, parse

__all__ = ["TakesMethod", "apply", "check_driven", "take_weights", "unwrap"]

_log = logging.getLogger(__name__)
_Host = TypeVar("_Host", bound="TakesMethod")


class TakesMethod(Protocol):
    """A model around a ViT, such as a detector, that a method can be applied to."""

    def with_method(self: _Host, drive: Callable[[nn.Module], ReducedViT]) -> _Host:
        """Return the same model, sharing all weights, with its ViT replaced by ``drive`` of it.

        Args:
            drive: takes the plain ViT and returns it with a method.
        """


@overload
def apply(
    model: _Host,
    method: str | Reducer | type[Reducer],
    *,
    budget: str | None = None,
    check: bool = True,
    **options: Any,
) -> _Host: ...


@overload
def apply(
    model: nn.Module,
    method: str | Reducer | type[Reducer],
    *,
    budget: str | None = None,
    check: bool = True,
    **options: Any,
) -> ReducedViT: ...


def apply(
    model: Any,
    method: str | Reducer | type[Reducer],
    *,
    budget: str | None = None,
    check: bool = True,
    **options: Any,
) -> Any:
    """Return a vision transformer that runs with a reduction method; the given model is unchanged.

    Args:
        model: a plain ViT of a supported family, or a model around one that takes a method (a dense
            backbone, a detector, a segmenter); its weights are shared, not copied.
        method: a name with options as keywords (``"evit", keep=0.7``), a string
            (``"evit(keep=0.7)"``, ``"evit + tome(r=4, blocks=[11])"``), a class or an instance.
        budget: find the method's rate (keep, r or K) at which an image of the model's own size
            costs this much: "2.9 GMACs", "0.6x" of the dense model, "60%"; or at which a pass takes
            this time on this machine: "1.5x faster", "12 ms", "12 ms, batch 8, bf16".
        check: compare the driven model with the native one, block by block, on one random image.
            Models on the meta device are not checked.
        options: the method's options when ``method`` is a plain name or a class.
    """
    if isinstance(model, ReducedViT):
        raise ValueError("the model has a method already: call foveate.unwrap(model) first")
    if hasattr(model, "with_method"):
        return model.with_method(
            lambda vit: apply(vit, method, budget=budget, check=check, **options)
        )
    reducer = _reducer(method, options)
    backbone = backbone_for(model)
    if backbone.needs_every_token:
        raise backbone.undrivable()
    if check:
        check_driven(backbone)
    if budget is not None:
        reducer = _within(budget, reducer, backbone)
    reducer.build(backbone.spec)
    reference = next(model.parameters())
    reducer.to(device=reference.device)
    if reference.dtype.is_floating_point:
        reducer.to(dtype=reference.dtype)
    if isinstance(method, Reducer):
        take_weights(reducer, method)
    if "cls_row" in reducer.reads and not backbone.spec.class_token:
        _log.warning(
            "%s reads class attention, but this model has no class token: the attention that each "
            "token receives is used instead, which needs the whole map and is slower",
            reducer.name,
        )
    driver: type[ReducedViT] = backbone.driver or ReducedViT
    return driver(backbone, reducer)


def _reducer(method: str | Reducer | type[Reducer], options: Mapping[str, Any]) -> Reducer:
    if isinstance(method, Reducer):
        if options:
            raise ValueError(f"give options {sorted(options)} to the method's own constructor")
        # A method is bound to one model, so a given instance serves as a template.
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


def _within(budget: str, reducer: Reducer, backbone: Backbone) -> Reducer:
    """Return the same method at the rate that meets a budget."""
    if isinstance(reducer, Chain):
        raise ValueError("a budget sets the rate of one method; give the rates of a chain yourself")
    given = reducer.config()
    if given.get(reducer.rate) != type(reducer)().config().get(reducer.rate):
        raise ValueError(f"give {reducer.rate} or a budget, not both")
    solve = solve_time_budget if is_time(budget) else solve_budget
    return solve(budget, backbone, lambda options: make(reducer.name, {**given, **options}))


def _rebuilt(method: Reducer) -> Reducer:
    if isinstance(method, Chain):
        return Chain(*(_rebuilt(part) for part in method.members))
    _check_registered(type(method))
    return make(method.name, method.config())


def take_weights(reducer: Reducer, given: Reducer) -> None:
    """Copy the weights of the given instance, if it has any, to the method made from it."""
    weights = given.state_dict()
    if not weights:
        return
    if given.pixel_classes:
        reducer.for_pixels(given.pixel_classes)
    try:
        reducer.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of the given {given.name} do not fit this model: "
            f"{' '.join(str(error).split())}"
        ) from None


def _check_registered(method: type[Reducer]) -> None:
    """Refuse a class that is not registered under its name."""
    if not method.name or method_class(method.name) is not method:
        raise ValueError(
            f"{method.__name__} is not registered: decorate it with @register(NAME) from "
            "foveate.registry"
        )


def unwrap(model: Any) -> nn.Module:
    """Return the model that was given to ``apply``; a model around a ViT runs dense again."""
    if hasattr(model, "with_method") and not isinstance(model, ReducedViT):
        return model.with_method(lambda vit: dense(backbone_for(vit)))
    return _reduced(model).vit


def _reduced(model: object) -> ReducedViT:
    if not isinstance(model, ReducedViT):
        raise ValueError(f"a model from foveate.apply is needed, got {type(model).__name__}")
    return model


# The self-check ----------------------------------------------------------------------------------


@torch.no_grad()
def check_driven(backbone: Backbone) -> None:
    """Refuse a backbone whose driven pass does not equal its native one.

    Logits of an untrained model prove little: with small LayerScale and head weights, leaving out
    all attention would hardly change them. So the check compares the residual change of each block,
    relative to its size, on unit-variance tokens. It also compares the embedding and the head.
    """
    model, spec = backbone.model, backbone.spec
    reference = next(model.parameters())
    if reference.is_meta:
        return
    with evaluating(model):
        _compare(backbone, reference)
    _log.debug("driven %s equals native in all %d blocks", spec.family, spec.depth)


def _compare(backbone: Backbone, reference: Tensor) -> None:
    spec = backbone.spec
    # In half precision, the same sums in another order differ by one part in a few hundred.
    tolerance = 1e-3 if reference.dtype in (torch.float32, torch.float64) else 5e-2
    size = [n * p for n, p in zip(spec.grid, spec.patch, strict=True)]
    noise = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise).to(reference.device, reference.dtype)

    images = random(1, backbone.channels, *size)
    calls, native = _watched(backbone, images)
    if backbone.needs_every_token:  # its own blocks are run, so they cannot differ
        _expect("logits", backbone.head(backbone.whole(images)), native, tolerance, spec.family)
        return
    driven = dense(backbone)
    state = driven.begin(images)
    _expect("embedding", state.tokens(), calls[0][0][0], tolerance, spec.family)
    for block, (stock, (args, kwargs)) in enumerate(zip(backbone.blocks, calls, strict=True)):
        x = random(*state.tokens().shape)
        change = _first(stock(x, *args[1:], **kwargs)) - x
        state = driven.step(block, state.with_tokens(x))
        _expect(f"block {block}", state.tokens() - x, change, tolerance, spec.family)
    tokens = random(*state.tokens().shape)
    logits = backbone.head(driven.end(state.with_tokens(tokens)))
    _expect("head", logits, _native_head(backbone, images, tokens), tolerance, spec.family)
    logits = driven.run(images).logits
    _expect("logits", logits, native, 10 * tolerance, spec.family)


def _watched(backbone: Backbone, images: Tensor) -> tuple[list[Any], Tensor]:
    """Return the arguments that every block is called with, and the model's own answer."""
    calls: dict[int, Any] = {}

    def watch(number: int, block: nn.Module) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[number] = (args, kwargs)

        return block.register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(number, block) for number, block in enumerate(backbone.blocks)]
    try:
        native = backbone.native(images)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(calls) != list(range(len(backbone.blocks))):
        raise ValueError(
            f"this {backbone.spec.family} cannot be driven: it calls only {len(calls)} of its "
            f"{len(backbone.blocks)} blocks"
        )
    return [calls[number] for number in sorted(calls)], native


def _native_head(backbone: Backbone, images: Tensor, tokens: Tensor) -> Tensor:
    """Return the answer that the model gives if its last block returns these tokens."""
    handle = backbone.blocks[-1].register_forward_hook(
        lambda _, __, out: (tokens, *out[1:]) if isinstance(out, tuple) else tokens
    )
    try:
        return backbone.native(images)
    finally:
        handle.remove()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _expect(what: str, driven: Tensor, native: Tensor, tolerance: float, family: str) -> None:
    scale = native.float().square().mean().sqrt().clamp_min(1e-12)
    error = (driven.float() - native.float()).square().mean().sqrt() / scale
    if driven.shape != native.shape or not error <= tolerance:
        raise ValueError(
            f"this {family} cannot be driven: its {what} differs from the model's own by "
            f"{float(error):.1e} relatively (at most {tolerance:.0e} is rounding). {SUPPORTED}; "
            "remove a replaced forward or a parametrisation that changes a block's output first"
        )
