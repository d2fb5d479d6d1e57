"""The variants of one interleaved run: a model, methods, their oracles, the un-fused model."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from foveate import api, facts
from foveate.backbones import backbone_of
from foveate.bench.gates import calibrate
from foveate.bench.images import Images, images_for, pictures_for
from foveate.bench.oracle import Counts, Oracle
from foveate.bench.unfused import unfused
from foveate.core import Backbone, ReducedViT, Reducer, Trace
from foveate.core.cost import counting
from foveate.core.executed import check_executed
from foveate.dense import DenseModel, Hosting
from foveate.timing import AGAIN, DENSE, DTYPES, UNFUSED, Call

__all__ = ["CALIBRATION_IMAGES", "DTYPES", "Calls", "DenseLineup", "Lineup", "Method", "lineup_of"]

CALIBRATION_IMAGES = 16
NETWORK = "network"

Method = str | Reducer | ReducedViT | Hosting


def lineup_of(
    model: nn.Module,
    methods: Sequence[Method] | Mapping[str, Method],
    device: str,
    compile: bool,
    seed: int,
) -> Lineup:
    """Line up a model with methods; arguments are those of ``speed``."""
    if not isinstance(model, Hosting):
        return Lineup(model, methods, device, compile, seed)
    if compile:
        raise ValueError("dense models are timed eagerly: leave compile out")
    return DenseLineup(model, methods, device, compile, seed)


@dataclass
class Calls:
    """Calls of all variants at one batch size, and facts about the methods.

    Attributes:
        calls: calls by the names of the variants.
        facts: facts about the methods, as in ``Cell.methods``.
        why_not_unfused: reason why there is no un-fused variant, or None.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    why_not_unfused: str | None = None


class Lineup:
    """The model and its methods, in one dtype after another; cells differ in the batch.

    Attributes:
        original: the model without a method, as it was given.
        left_out: methods that are not measured, with the reasons.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method] | Mapping[str, Method],
        device: str,
        compile: bool,
        seed: int,
    ) -> None:
        self.device, self.compile, self.seed = device, compile, seed
        backbone = _backbone(model)
        self.spec, self.channels = backbone.spec, backbone.channels
        self.original: nn.Module = self._plain(model)
        self.methods = self._named(model, methods)
        self.left_out: dict[str, str] = {}
        self.dense: Any = self.original
        self.models: dict[str, Any] = {}
        self.parameters: dict[str, str | None] = {}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have their own runs; "" is the whole model."""
        return ("",)

    def _plain(self, model: nn.Module) -> nn.Module:
        return backbone_of(model).model

    def _named(
        self, model: nn.Module, methods: Sequence[Method] | Mapping[str, Method]
    ) -> dict[str, Method]:
        if isinstance(methods, (str, nn.Module)):
            raise ValueError(f"methods must be a list or a mapping, got {methods!r}")
        pairs: list[tuple[str, Method]] = []
        if isinstance(model, (ReducedViT, Hosting)) and model.reducer.name != "dense":
            pairs.append((repr(model.reducer), model))
        if isinstance(methods, Mapping):
            pairs += methods.items()
        else:
            pairs += [(_name(method), method) for method in methods]
        for place, (name, method) in enumerate(pairs):
            if name in (DENSE, AGAIN, UNFUSED) or name.startswith("oracle of "):
                raise ValueError(f"{name!r} is the name of another variant: rename the method")
            if name in (earlier for earlier, _ in pairs[:place]):
                raise ValueError(f"{name} is given twice: name methods by a mapping")
            if _is_model(method) and _backbone(method).spec != self.spec:
                raise ValueError(
                    f"{name} runs on another architecture than the dense model: it must be the same"
                )
        return dict(pairs)

    # What DenseLineup overrides -------------------------------------------------------------------

    def pictures(self, count: int, given: Any) -> Images:
        """Return ``count`` images to measure on; ``given`` images may be fewer."""
        rows, columns = (n * p for n, p in zip(self.spec.grid, self.spec.patch, strict=True))
        return images_for(self.channels, (rows, columns), count, self.seed + 1000, given)

    def autocast(self, dtype: str) -> AbstractContextManager[Any]:
        """Return the context in which calls run."""
        return nullcontext()

    def _weights(self, dtype: str) -> torch.dtype:
        return DTYPES[dtype]

    def _inputs(self, images: Any) -> Any:
        """Move images to the device and dtype of the models."""
        reference = next(self.dense.parameters())
        return images.to(reference.device, reference.dtype)

    def _blocks(self, model: Any, images: Any) -> tuple[Any, Any]:
        """Return the module that runs the blocks, and the images as it takes them."""
        return model, images

    def _called(self, model: Any, images: Any, part: str) -> tuple[Any, Any]:
        """Return the module that is timed, and the images as it takes them."""
        return model, images

    def _around(self, model: Any, oracle: Oracle) -> nn.Module:
        """Replace a model's driven ViT by an oracle."""
        return oracle

    def _unfused(self, images: Any) -> nn.Module:
        return unfused(self.dense, images)

    def _cost_ratio(self, model: Any, trace: Trace, images: Any, part: str) -> float:
        """Return multiply-adds over the dense model's, on these images if counts depend on them."""
        try:
            return facts.count(model, trace=trace).ratio
        except ValueError:  # a method that cannot compute its own cost is counted by running it
            return facts.count(model, images=images).ratio

    # Making them ready ----------------------------------------------------------------------------

    def prepare(self, dtype: str, pictures: Images) -> None:
        """Make copies of everything in a dtype, on the device."""
        to: dict[str, Any] = {"device": self.device, "dtype": self._weights(dtype)}
        copied: dict[int, Any] = {}  # what is shared stays shared
        self.models.clear()
        self.dense = copy.deepcopy(self.original, copied).to(**to).eval().requires_grad_(False)
        for name, method in self.methods.items():
            fresh = not _is_model(method)
            if fresh:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed)
                    model: Any = api.apply(self.dense, method)  # type: ignore[arg-type]
            else:
                model = copy.deepcopy(method, copied).to(**to)  # type: ignore[union-attr]
            model.eval().requires_grad_(False)
            if self.compile and not model.reducer.fixed_count:
                self.left_out[name] = "its count differs from image to image, so it is not compiled"
                continue
            self.models[name] = model
            self.parameters[name] = self._ready(model, fresh, pictures)

    def _ready(self, model: Any, fresh: bool, pictures: Images) -> str | None:
        """Set untrained gates; return how the method's parameters came about."""
        new = any(True for _ in model.reducer.parameters())
        if not fresh:
            return "as saved" if new else None
        last = len(pictures.pixels) - CALIBRATION_IMAGES
        images = self._inputs(pictures.take(CALIBRATION_IMAGES, max(0, last)))
        if calibrate(*self._blocks(model, images)):
            return "untrained, scaled and shifted to their target share"
        return "untrained" if new else None

    # Lining up ------------------------------------------------------------------------------------

    def cell(self, images: Any, part: str, compile_mode: str) -> Calls:
        """Return the calls of all variants on these images."""
        images = self._inputs(images)
        found = Calls()

        def call(model: Any) -> Call:
            return self._call(*self._called(model, images, part), compile_mode)

        for name in (DENSE, AGAIN):
            found.calls[name] = call(self.dense)
        try:
            twin = self._unfused(images)
        except ValueError as error:
            found.why_not_unfused = str(error)
        else:
            found.calls[UNFUSED] = call(twin)
        known: dict[tuple[Any, ...], str] = {}
        for name, model in self.models.items():
            blocks, inputs = self._blocks(model, images)
            trace = blocks.trace(inputs)
            self._check_in_effect(model, images, part, trace)
            counts, shared = Counts.of(trace), None
            if part != NETWORK:
                oracle = Oracle.of(_reduced(model), trace, images[0])
                same = (oracle.even, id(_reduced(model).vit), counts)
                if same not in known:  # methods with the same schedule share an oracle
                    known[same] = f"oracle of {name}"
                    found.calls[known[same]] = call(self._around(model, oracle))
                shared = known[same]
            found.calls[name] = call(model)
            macs = self._cost_ratio(model, trace, images, part)
            found.facts[name] = self._facts(name, shared, counts, macs)
        return found

    def _check_in_effect(self, model: Any, images: Any, part: str, trace: Trace) -> None:
        """Raise RuntimeError if a model computes other tokens than its method decided."""
        run, inputs = self._called(model, images, part)
        wanted = [sum(lengths) for lengths in trace.counts()]
        with torch.autocast(self.device, enabled=False):
            check_executed(_backbone(model), lambda: run(inputs), wanted)

    def _facts(self, name: str, oracle: str | None, counts: Counts, macs: float) -> dict[str, Any]:
        return {
            "oracle": oracle,
            "tokens": counts.summary(),
            "macs": macs,
            "acting_blocks": len(self.models[name].reducer.active_blocks),
            "depth": self.spec.depth,
            "parameters": self.parameters[name],
        }

    def _call(self, model: nn.Module, images: Any, compile_mode: str) -> Call:
        def run() -> Any:
            return model(images)

        if not self.compile:
            return run
        # Each variant gets its own code object, so that none of them checks the guards of the
        # others.
        fresh = types.FunctionType(
            run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
        )
        return torch.compile(fresh, fullgraph=True, dynamic=False, mode=compile_mode)


class DenseLineup(Lineup):
    """A detector, a segmenter or a dense backbone: its backbone first, then the whole network.

    The network has no oracles: their maps differ, and the cost of its heads depends on the maps.
    """

    @property
    def parts(self) -> tuple[str, ...]:
        return ("backbone", NETWORK) if isinstance(self.original, DenseModel) else ("backbone",)

    def _plain(self, model: nn.Module) -> nn.Module:
        return api.unwrap(model)

    def pictures(self, count: int, given: Any) -> Images:
        return pictures_for(self.original, count, self.seed + 1000, given)  # type: ignore[arg-type]

    def autocast(self, dtype: str) -> AbstractContextManager[Any]:
        if dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device, DTYPES[dtype])

    def _weights(self, dtype: str) -> torch.dtype:
        return torch.float32  # not all of a detector computes in half precision

    def _inputs(self, images: Any) -> Any:
        return [image.to(self.device) for image in images]

    def _blocks(self, model: Any, images: Any) -> tuple[Any, Any]:
        return model.trunk, model.prepared(images)

    def _called(self, model: Any, images: Any, part: str) -> tuple[Any, Any]:
        return (model, images) if part == NETWORK else self._blocks(model, images)

    def _around(self, model: Any, oracle: Oracle) -> nn.Module:
        hosting: nn.Module = model.with_method(lambda vit: oracle)
        return hosting

    def _unfused(self, images: Any) -> nn.Module:
        raise ValueError("not measured for dense models")

    def _cost_ratio(self, model: Any, trace: Trace, images: Any, part: str) -> float:
        return self._spent(model, images, part) / self._spent(self.dense, images, part)

    def _spent(self, model: Any, images: Any, part: str) -> float:
        called, inputs = self._called(model, images, part)
        with counting(model) as spent:
            called(inputs)
            return spent()


def _is_model(method: Any) -> bool:
    return isinstance(method, (ReducedViT, Hosting))


def _reduced(model: Any) -> ReducedViT:
    reduced: ReducedViT = model.reduced if isinstance(model, Hosting) else model
    return reduced


def _backbone(model: Any) -> Backbone:
    return backbone_of(_reduced(model))


def _name(method: Method) -> str:
    if isinstance(method, str):
        return method.strip()
    return repr(method.reducer if isinstance(method, (ReducedViT, Hosting)) else method)
