"""Count what a model costs, and describe how it runs; nothing here is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backbones import backbone_for, backbone_of
from foveate.core import BackboneSpec, ReducedViT, Reducer, Trace, dense
from foveate.core.cost import (
    BlockTokens,
    Cost,
    cost,
    counting,
    has_formula,
    measured,
    on_meta,
    run,
    run_on_meta,
)
from foveate.core.evaluation import evaluating
from foveate.latency import LatencyTable

__all__ = ["Count", "count", "describe", "image_grid"]


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one image, parameters, and tokens of every block.

    Attributes:
        macs: multiply-adds of one image, the method's own included.
        dense_macs: those of the model without the method.
        method_macs: the method's own share of ``macs``.
        parameters: number of all parameters.
        new_parameters: number of those that the method added.
        tokens: tokens that each block feeds forward, prefix included; means where images differ.
        how: "exact", "expected" (the method's target rates, or an upper bound) or "measured".
        parts: multiply-adds of a dense model by part: "vit" with its method, "maps" (adapter or
            pyramid) and "heads"; empty for a ViT.
        left_out: parts of a dense model that are not counted, because their cost depends on what
            the model finds.
    """

    macs: float
    dense_macs: float
    method_macs: float
    parameters: int
    new_parameters: int
    tokens: tuple[float, ...]
    how: str
    parts: Mapping[str, float] = field(default_factory=dict)
    left_out: str = ""

    @property
    def ratio(self) -> float:
        """Multiply-adds as a share of the dense model's."""
        return self.macs / self.dense_macs


def count(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    *,
    images: Tensor | Sequence[Tensor] | None = None,
    trace: Trace | None = None,
) -> Count:
    """Count multiply-adds, parameters and tokens as they are in evaluation.

    Nothing is computed unless ``images`` are given, so models on the meta device can be counted
    too. Dense models (backbones with maps, detectors, segmenters) are counted for a single image,
    padded to a size that their maps divide. Norms, activations, interpolation, the weighted sums
    that read points in deformable attention, and what ``left_out`` names are not counted.

    Args:
        model: a model from ``foveate.apply``, or a plain ViT that it takes; or a dense model.
        image_size: size to count for, if not the model's own. For a dense model it is the size of
            the image after resizing.
        images: measure the counts on these instead of expecting them, for methods with a count
            per image. A dense model takes a list of images of any sizes.
        trace: measure the counts on this trace instead.
    """
    if sum(given is not None for given in (image_size, images, trace)) > 1:
        raise ValueError("give only one of image_size, images and trace")
    if hasattr(model, "fixed") and not isinstance(model, ReducedViT):
        return _of_host(model, image_size, images, trace)
    if images is not None and not isinstance(images, Tensor):
        raise ValueError("only a dense model takes a list of images; give a batch")
    if images is not None and not isinstance(model, ReducedViT):
        raise ValueError("a plain ViT costs the same for all images: leave images= out")
    backbone = backbone_of(model)
    reducer = model.reducer if isinstance(model, ReducedViT) else None
    spec = backbone.spec
    grid = spec.grid if image_size is None else image_grid(image_size, spec.patch)
    if trace is not None:
        grid = trace.grid
    elif images is not None:
        grid = backbone.grid_of(images)
    how = "measured"
    if reducer is None:
        how, costs = "exact", [cost(spec, None, grid)]
    elif trace is not None and has_formula(reducer):
        costs = [cost(spec, reducer, grid, tokens) for tokens in measured(trace)]
    elif images is not None:
        assert isinstance(model, ReducedViT)
        costs = _measured(model, images, grid)
    else:
        how, one = _expected(spec, reducer, grid)
        costs = [one]
    total = fmean(c.total for c in costs)
    plain = fmean(cost(spec, reducer, grid, c.tokens, own=False).total for c in costs)
    new = 0 if reducer is None else sum(p.numel() for p in reducer.parameters())
    return Count(
        macs=total,
        dense_macs=cost(spec, None, grid).total,
        method_macs=total - plain,
        parameters=sum(p.numel() for p in backbone.model.parameters()) + new,
        new_parameters=new,
        tokens=_mean_tokens(costs),
        how=how,
    )


def _expected(spec: BackboneSpec, reducer: Reducer, grid: tuple[int, int]) -> tuple[str, Cost]:
    """Return "exact" or "expected", and the cost of an image that is not known yet."""
    if reducer.fixed_count:
        return "exact", _by_running(spec, reducer, grid)
    if has_formula(reducer):
        return "expected", cost(spec, reducer, grid)
    raise ValueError(
        f"how many tokens {reducer!r} keeps depends on the image: give images= to measure it"
    )


# A pass on the meta device takes a tenth of a second, and reports ask for the same one many times.
_COUNTED: dict[tuple[object, ...], Cost] = {}


_TRACED = 32  # images at a time; a trace holds on to the tokens of every block


def _by_running(spec: BackboneSpec, reducer: Reducer, grid: tuple[int, int]) -> Cost:
    """Count a method with fixed counts by running it on the meta device."""
    progress = tuple(part.progress for part in reducer.members)
    key = (spec, repr(reducer), progress, grid)
    if key not in _COUNTED:
        method = on_meta(reducer)
        assert isinstance(method, Reducer)
        _COUNTED[key] = run_on_meta(spec, method, grid)
    return _COUNTED[key]


def _measured(model: ReducedViT, images: Tensor, grid: tuple[int, int]) -> list[Cost]:
    """Count every image as in evaluation: from its tokens, or by running it alone."""
    reducer = model.reducer
    with evaluating(model):
        if reducer.fixed_count:  # what holds for one image holds for all
            return [run(model, images[:1])]
        if not has_formula(reducer):
            return [run(model, image[None]) for image in images]
        return [
            cost(model.backbone.spec, reducer, grid, tokens)
            for part in images.split(_TRACED)
            for tokens in measured(model.trace(part))
        ]


def _mean_tokens(costs: list[Cost]) -> tuple[float, ...]:
    means = (
        fmean(b.mlp for b in blocks) for blocks in zip(*(c.tokens for c in costs), strict=True)
    )
    return tuple(int(n) if n == int(n) else n for n in means)


# Dense models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Around:
    """Cost of a dense model at one image size, without a method.

    Attributes:
        spec: facts of its ViT as it is used: without a head, perhaps without prefix tokens.
        grid: the image's own patch rows and columns.
        vit, maps, heads: multiply-adds of the parts.
    """

    spec: BackboneSpec
    grid: tuple[int, int]
    vit: float
    maps: float
    heads: float


def _of_host(
    model: Any,
    image_size: int | tuple[int, int] | None,
    images: Tensor | Sequence[Tensor] | None,
    trace: Trace | None,
) -> Count:
    """Count a dense model (``foveate.dense.Hosting``, which this file must not import).

    Its parts are counted on the meta device without the method; the method is counted as on a ViT.
    """
    reducer, baseline = model.reduced.reducer, _Baseline(model)
    if trace is not None and not (reducer.fixed_count or has_formula(reducer)):
        raise ValueError(f"the cost of {reducer!r} cannot be computed from a trace: give images=")
    how, pairs, without = "measured", [], []
    if images is None and trace is None:
        around = baseline.at(_pixels(model.input_size if image_size is None else image_size))
        with _used_as(reducer, around.spec):
            how, one = _expected(around.spec, reducer, around.grid)
        pairs.append((around, one))
    else:
        for grid, tokens, total in _tokens_per_image(model, images, trace):
            around = baseline.at((grid[0] * baseline.patch[0], grid[1] * baseline.patch[1]))
            with _used_as(reducer, around.spec):
                if total is not None:  # counted by running; the rest is the ViT's
                    one = Cost(total - around.maps - around.heads, tuple(tokens))
                elif reducer.fixed_count:
                    one = _by_running(around.spec, reducer, grid)
                else:
                    one = cost(around.spec, reducer, grid, tokens)
            pairs.append((around, one))
    # Windows are not a method: the parts were counted with them.
    windows = model.reduced.windows is not None
    for around, one in pairs:
        plainly = cost(around.spec, reducer, around.grid, one.tokens, own=False).total
        without.append(around.vit if windows else plainly)
    parts = {
        "vit": fmean(a.vit if windows else one.total for a, one in pairs),
        "maps": fmean(a.maps for a, _ in pairs),
        "heads": fmean(a.heads for a, _ in pairs),
    }
    return Count(
        macs=sum(parts.values()),
        dense_macs=fmean(a.vit + a.maps + a.heads for a, _ in pairs),
        method_macs=parts["vit"] - fmean(without),
        parameters=sum(p.numel() for p in model.parameters()),
        new_parameters=sum(p.numel() for p in reducer.parameters()),
        tokens=_mean_tokens([one for _, one in pairs]),
        how=how,
        parts=parts,
        left_out=model.uncounted,
    )


@contextmanager
def _used_as(reducer: Reducer, spec: BackboneSpec) -> Iterator[None]:
    """Let a method compute its cost for another use of its ViT, such as without prefix tokens."""
    before = [(part, part.spec) for part in reducer.members]
    for part, _ in before:
        part.spec = spec
    try:
        yield
    finally:
        for part, own in before:
            part.spec = own


class _Baseline:
    """Counts a dense model without its method on the meta device, once for each image size."""

    def __init__(self, model: Any) -> None:
        reduced = model.reduced
        self.patch = reduced.backbone.spec.patch
        if reduced.windows is None:
            model = model.with_method(lambda vit: dense(backbone_for(vit)))
        self.model: Any = on_meta(model)
        self._known: dict[tuple[int, int], _Around] = {}

    def at(self, size: tuple[int, int]) -> _Around:
        """Count the parts for an image of this size."""
        if size not in self._known:
            self._known[size] = self._counted(size)
        return self._known[size]

    def _counted(self, size: tuple[int, int]) -> _Around:
        model, body = self.model, self.model.reduced
        like = next(model.parameters())
        image = torch.empty(1, body.backbone.channels, *size, device="meta", dtype=like.dtype)
        with counting(model) as spent:
            vit = _meter(body, ("begin", "step"), spent)
            maps = _meter(model.trunk, ("features",), spent)
            state = model.fixed(image).state
            whole = spent()
        spec, prefix = body.backbone.spec, state.prefix
        spec = replace(
            spec,
            prefix=prefix,
            class_token=spec.class_token and prefix > 0,
            classes=0,
            head_cost=0,
            pool_cost=0,
        )
        return _Around(spec, state.grid, sum(vit), sum(maps) - sum(vit), whole - sum(maps))


def _meter(module: nn.Module, names: Sequence[str], spent: Callable[[], float]) -> list[float]:
    """Record the cost of every later call of some methods of a module."""
    found: list[float] = []

    def metered(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            before = spent()
            result = call(*args, **options)
            found.append(spent() - before)
            return result

        return called

    for name in names:
        vars(module)[name] = metered(getattr(module, name))  # hides the method of the class
    return found


def _tokens_per_image(
    model: Any, images: Tensor | Sequence[Tensor] | None, trace: Trace | None
) -> list[tuple[tuple[int, int], list[BlockTokens], float | None]]:
    """Return each image's grid and tokens, and its total cost if only running it gives that."""
    if trace is not None:
        pairs = zip(trace.grids, measured(trace), strict=True)
        return [(grid, tokens, None) for grid, tokens in pairs]
    assert images is not None
    reducer, found = model.reduced.reducer, []
    alone = not (reducer.fixed_count or has_formula(reducer))
    with evaluating(model):
        for image in images:
            prepared = model.prepared([image])
            traced, total = model.trunk.trace(prepared), None
            if alone:
                with counting(model) as spent:
                    model.fixed(prepared)
                    total = spent()
            found.append((traced.grid, measured(traced)[0], total))
    return found


def _pixels(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an image of any size; raise ValueError if it is not a size."""
    sizes = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size,) * 2
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"image_size must be one or two whole numbers above 0, got {image_size!r}")
    return sizes[0], sizes[1]


def describe(model: ReducedViT, image_size: int | tuple[int, int] | None = None) -> str:
    """Describe on one screen the method, tokens per block, multiply-adds and how it trains.

    Args:
        model: a model from ``apply``.
        image_size: size to describe it for, if not the model's own.
    """
    if not isinstance(model, ReducedViT):
        raise ValueError(f"a model from foveate.apply is needed, got {type(model).__name__}")
    spec, reducer = model.backbone.spec, model.reducer
    grid = spec.grid if image_size is None else image_grid(image_size, spec.patch)
    counted = count(model, image_size)
    dense, reduced, own = (n / 1e9 for n in (counted.dense_macs, counted.macs, counted.method_macs))
    fixed = reducer.fixed_count
    attention = "fused"
    if "full_map" in reducer.reads or ("cls_row" in reducer.reads and not spec.class_token):
        attention = "fused, plus the whole map in blocks that read scores"
    elif "cls_row" in reducer.reads:
        attention = "fused, plus one row of the map in blocks that read scores"
    losses = _losses(reducer)
    lines = [
        f"{reducer!r} on {spec.family}, width {spec.width}, depth {spec.depth}"
        + (f" after {spec.early} in the embedding, " if spec.early else ", ")
        + f"{grid[0]} x {grid[1]} patches, {spec.prefix} prefix token{'s' * (spec.prefix != 1)}",
        f"tokens per block: {' '.join(str(n) for n in counted.tokens)}"
        + ("" if fixed else "  (expected, or an upper bound: each image has its own count)"),
        f"GMACs: {reduced:.{_digits(reduced)}f} of {dense:.{_digits(dense)}f} "
        f"({counted.ratio:.0%}){'' if fixed else ', at those counts'}; "
        f"the method itself takes {own:.{_digits(own)}f}",
        *([] if image_size else _times(model)),
        f"attention: {attention}",
        f"training: {reducer.training_need}"
        + (f" (losses besides the task's: {', '.join(losses)})" if losses else ""),
        f"parameters: {counted.parameters:,}, {counted.new_parameters:,} of them new",
        f"modes: {', '.join(_modes(reducer))}",
    ]
    return "\n".join(lines)


def _times(model: ReducedViT) -> list[str]:
    """Return a line with the predicted time for each latency table that is kept of the model."""
    if next(model.parameters()).is_meta:
        return []
    backbone = model.backbone
    blocks = _expected(backbone.spec, model.reducer, backbone.spec.grid)[1].tokens
    return [
        f"time: about {table.predict_pass(blocks):.3g} of {table.whole(backbone.spec.depth):.3g} "
        f"ms, predicted from block times measured here ({table}), without the method's own work"
        for table in LatencyTable.all_known(backbone)
    ]


def _digits(value: float) -> int:
    return 2 if value >= 0.1 or value == 0 else 4


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


def image_grid(image_size: int | tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return patch rows and columns of an image size; raise ValueError if it does not fit."""
    sizes = _pixels(image_size)
    for size, side in zip(sizes, patch, strict=True):
        if size % side:
            raise ValueError(f"image size {size} is not a multiple of the patch's {side}")
    return sizes[0] // patch[0], sizes[1] // patch[1]
