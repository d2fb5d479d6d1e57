"""What a model costs and how it runs: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from torch import Tensor, nn

from foveate.backbones import backbone_for
from foveate.core import ReducedViT, Reducer
from foveate.core.cost import BlockPlan, Cost, cost, measured
from foveate.core.driver import Trace

__all__ = ["Count", "count", "describe", "image_grid"]


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one image, parameters, and tokens of every block.

    Attributes:
        macs: multiply-adds of one image, the method's own included.
        dense_macs: those of the model without the method.
        method_macs: the method's own share of ``macs``.
        parameters: all of them.
        new_parameters: those that the method added.
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
    """Count multiply-adds, parameters and tokens; works on the meta device too.

    Nothing is run unless ``images`` are given.

    Args:
        model: a model from ``foveate.apply``, or a plain ViT that it takes.
        image_size: other than the model's own.
        images: measure the counts of these instead of expecting them, for methods with a count
            per image.
        trace: the same from a trace that was made already.
    """
    if sum(given is not None for given in (image_size, images, trace)) > 1:
        raise ValueError("give only one of image_size, images and trace")
    reducer: Reducer | None = None
    if isinstance(model, ReducedViT):
        backbone, reducer = model.backbone, model.reducer
    else:
        backbone = backbone_for(model)
    if images is not None:
        if not isinstance(model, ReducedViT):
            raise ValueError("images are measured on a model from foveate.apply only")
        trace = model.trace(images)
    spec = backbone.spec
    grid = spec.grid if image_size is None else image_grid(image_size, spec.patch)
    how = "exact" if reducer is None or reducer.fixed_count else "expected"
    runs: list[list[BlockPlan] | None] = [None]
    if trace is not None:
        grid, how = trace.grid, "measured"
        runs = list(measured(trace))
    costs = [cost(spec, reducer, grid, tokens) for tokens in runs]
    new = 0 if reducer is None else sum(p.numel() for p in reducer.parameters())
    return Count(
        macs=fmean(c.total for c in costs),
        dense_macs=cost(spec, None, grid).total,
        method_macs=fmean(sum(c.method) for c in costs),
        parameters=sum(p.numel() for p in backbone.model.parameters()) + new,
        new_parameters=new,
        tokens=_mean_tokens(costs),
        how=how,
    )


def _mean_tokens(costs: list[Cost]) -> tuple[float, ...]:
    means = (
        fmean(b.fed for b in blocks) for blocks in zip(*(c.tokens for c in costs), strict=True)
    )
    return tuple(int(n) if n == int(n) else n for n in means)


def describe(model: ReducedViT, image_size: int | tuple[int, int] | None = None) -> str:
    """One screen of facts: the method, tokens per block, multiply-adds, training.

    Args:
        model: a model from ``apply``.
        image_size: other than the model's own.
    """
    if not isinstance(model, ReducedViT):
        raise ValueError(f"a model from foveate.apply is needed, got {type(model).__name__}")
    spec, reducer = model.backbone.spec, model.reducer
    grid = spec.grid if image_size is None else image_grid(image_size, spec.patch)
    counted = count(model, image_size)
    dense, reduced, own = (n / 1e9 for n in (counted.dense_macs, counted.macs, counted.method_macs))
    fixed = reducer.fixed_count
    attention = "fused"
    if "attention" in reducer.needs or ("cls_row" in reducer.needs and not spec.class_token):
        attention = "fused, and the whole map beside it where scores are read"
    elif "cls_row" in reducer.needs:
        attention = "fused, and one row beside it where scores are read"
    losses = _losses(reducer)
    lines = [
        f"{reducer!r} on {spec.family}, width {spec.width}, depth {spec.depth}, "
        f"{grid[0]} x {grid[1]} patches, {spec.prefix} prefix token{'s' * (spec.prefix != 1)}",
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
    """Patch rows and columns at an image size; ValueError where the patch does not divide it."""
    sizes = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size,) * 2
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"image_size must be one or two whole numbers, got {image_size!r}")
    for size, side in zip(sizes, patch, strict=True):
        if size <= 0 or size % side:
            raise ValueError(f"image size {size} is not a multiple of the patch's {side}")
    return sizes[0] // patch[0], sizes[1] // patch[1]
