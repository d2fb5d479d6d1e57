"""What a model costs and how it runs: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from torch import Tensor, nn

from foveate.backbones import backbone_of
from foveate.core import BackboneSpec, ReducedViT, Reducer, Trace
from foveate.core.cost import Cost, cost, has_formula, measured, on_meta, run, run_on_meta
from foveate.core.evaluation import evaluating

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
    """

    macs: float
    dense_macs: float
    method_macs: float
    parameters: int
    new_parameters: int
    tokens: tuple[float, ...]
    how: str

    @property
    def ratio(self) -> float:
        """Multiply-adds as a share of the dense model's."""
        return self.macs / self.dense_macs


def count(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    *,
    images: Tensor | None = None,
    trace: Trace | None = None,
) -> Count:
    """Count multiply-adds, parameters and tokens as evaluation would have them.

    Nothing is computed unless ``images`` are given; it works on the meta device too.

    Args:
        model: a model from ``foveate.apply``, or a plain ViT that it takes.
        image_size: size to count for, if not the model's own.
        images: measure the counts on these instead of expecting them, for methods with a count
            per image.
        trace: the same from a trace that was made already.
    """
    if sum(given is not None for given in (image_size, images, trace)) > 1:
        raise ValueError("give only one of image_size, images and trace")
    if images is not None and not isinstance(model, ReducedViT):
        raise ValueError("images are measured on a model from foveate.apply only")
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
    elif reducer.fixed_count:
        how, costs = "exact", [_by_running(spec, reducer, grid)]
    elif has_formula(reducer):
        how, costs = "expected", [cost(spec, reducer, grid)]
    else:
        raise ValueError(
            f"how many tokens {reducer!r} keeps depends on the image: give images= to measure it"
        )
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
    """Count every image as in evaluation: from the tokens it had, or by running it alone."""
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


def describe(model: ReducedViT, image_size: int | tuple[int, int] | None = None) -> str:
    """Say on one screen: the method, tokens per block, multiply-adds, how it trains.

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
        attention = "fused, and the whole map beside it where scores are read"
    elif "cls_row" in reducer.reads:
        attention = "fused, and one row beside it where scores are read"
    losses = _losses(reducer)
    lines = [
        f"{reducer!r} on {spec.family}, width {spec.width}, depth {spec.depth}"
        + (f" after {spec.early} in the embedding, " if spec.early else ", ")
        + f"{grid[0]} x {grid[1]} patches, {spec.prefix} prefix token{'s' * (spec.prefix != 1)}",
        f"tokens per block: {' '.join(str(n) for n in counted.tokens)}"
        + ("" if fixed else "  (expected or at most: each image has its own count)"),
        f"GMACs: {reduced:.{_digits(reduced)}f} of {dense:.{_digits(dense)}f} "
        f"({counted.ratio:.0%}){'' if fixed else ', at those counts'}; "
        f"{own:.{_digits(own)}f} are the method's own",
        f"attention: {attention}",
        f"training: {reducer.training_need}"
        + (f" (losses beside the task: {', '.join(losses)})" if losses else ""),
        f"parameters: {counted.parameters:,}, {counted.new_parameters:,} of them new",
        f"modes: {', '.join(_modes(reducer))}",
    ]
    return "\n".join(lines)


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
    """Return patch rows and columns of an image size; ValueError if the patch does not fit."""
    sizes = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size,) * 2
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"image_size must be one or two whole numbers, got {image_size!r}")
    for size, side in zip(sizes, patch, strict=True):
        if size <= 0 or size % side:
            raise ValueError(f"image size {size} is not a multiple of the patch's {side}")
    return sizes[0] // patch[0], sizes[1] // patch[1]
