"""Measure methods against the dense model, fused and un-fused, and against their oracles."""

from __future__ import annotations

import copy
import gc
import logging
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate import api, facts
from foveate.backbones import backbone_of
from foveate.bench import machine, profiling
from foveate.bench.gates import calibrate
from foveate.bench.images import Images, images_for
from foveate.bench.memory import peak_memory
from foveate.bench.oracle import Counts, Oracle
from foveate.bench.result import Cell, Result
from foveate.bench.timing import AGAIN, DENSE, LEAST_ROUNDS, UNFUSED, Call, measure
from foveate.bench.unfused import unfused
from foveate.core import ReducedViT, Reducer, Trace
from foveate.core.schedule import check_choice

__all__ = ["CALIBRATION_IMAGES", "DTYPES", "Progress", "explain", "speed"]

_log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CALIBRATION_IMAGES = 16

Method = str | Reducer | ReducedViT
# Told what is measured, how many rounds are done, and how many there are.
Progress = Callable[[str, int, int], None]


def speed(
    model: nn.Module,
    methods: Sequence[Method] | Mapping[str, Method] = (),
    *,
    batches: Sequence[int] = (1, 8, 32),
    dtypes: Sequence[str] = ("fp32",),
    rounds: int = LEAST_ROUNDS,
    warmup: int = 3,
    sample_ms: float = 20.0,
    device: str = "auto",
    compile: bool = False,
    compile_mode: str = "default",
    images: Tensor | Images | None = None,
    seed: int = 0,
    name: str | None = None,
    command: str | None = None,
    notes: Mapping[str, Any] | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    finished: Callable[[Result], None] | None = None,
) -> Result:
    """Time methods on a model in interleaved runs, one run for each batch and dtype.

    In every round each variant is timed once, in random order: the dense model twice (their ratio
    is the noise), the dense model with un-fused attention, every method, and its oracle, which has
    the same token counts by slicing. The given model is not changed.

    Args:
        model: a plain ViT, or a model from ``apply``, whose own method is then measured too.
        methods: strings such as "evit(keep=0.7)", methods, or models from ``apply`` of the same
            architecture, which stay as they are; a mapping gives them names.
        batches: batch sizes.
        dtypes: any of "fp32", "bf16", "fp16".
        rounds: rounds that count, at least 30.
        warmup: rounds before them that do not.
        sample_ms: least time of one sample, by repeats.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        compile: compiled instead of eager; methods with a count per image are left out.
        compile_mode: of torch.compile.
        images: preprocessed images ``[N, C, H, W]`` for methods with a count per image. None takes
            Fashion-MNIST for models of grey 28 x 28 images, else synthetic ones.
        seed: of images, new parameters and the order within rounds.
        name: what to call the model.
        command: what was typed, for the record.
        notes: further settings for the record.
        quick: fewer rounds are allowed: a trial, not a result.
        progress: told after every round how far a cell is.
        finished: given the result so far after every cell.
    """
    device = machine.device_of(device)
    _check(batches, dtypes, rounds, quick)
    if machine.malloc_untuned(device):
        _log.warning(
            "malloc is not tuned: times are longer and noisier than they need be; foveate bench "
            "tunes it, or start Python with the settings in foveate/bench/machine.py"
        )
    lineup = _Lineup(model, methods, device, compile, seed)
    needed = max(batches) + CALIBRATION_IMAGES
    pictures = images_for(lineup.channels, lineup.size, needed, seed + 1000, images)
    name = name or type(lineup.given.vit if lineup.given else model).__name__
    result = Result(
        command,
        machine.commit(),
        machine.facts(device),
        {
            "quick": quick,
            "seed": seed,
            "warmup_rounds": warmup,
            "least_sample_ms": sample_ms,
            "gradients": "no_grad" if compile else "inference_mode",
            "compile_mode": compile_mode if compile else None,
            "freezing": compile and device == "cpu",
            "images": pictures.source,
            **(notes or {}),
        },
        left_out=lineup.left_out,
    )
    for dtype in dtypes:
        with torch.no_grad():
            lineup.prepare(dtype, pictures)
        for batch in batches:
            with ExitStack() as stack:
                _modes(stack, compile, device)
                cell = lineup.cell(pictures.take(batch), compile_mode)
                title = f"{name}, {dtype}, batch {batch}"
                for done, call in enumerate(cell.calls.values()):  # compiles, and fills caches
                    if progress is not None and compile:
                        progress(f"{title}: compiling", done, len(cell.calls))
                    call()
                timings = measure(
                    cell.calls,
                    rounds=rounds,
                    warmup=warmup,
                    sample_ms=sample_ms,
                    device=device,
                    seed=seed,
                    progress=None if progress is None else partial(progress, title),
                )
                memory = {key: peak_memory(call, device) for key, call in cell.calls.items()}
            result.cells.append(
                Cell(
                    name,
                    dtype,
                    batch,
                    compile,
                    timings,
                    cell.facts,
                    cell.why_not_unfused,
                    memory,
                    uuid.uuid4().hex,
                )
            )
            if finished is not None:
                finished(result)
            del cell
            if compile:
                torch._dynamo.reset()
            gc.collect()
    return result


def explain(
    model: nn.Module,
    method: Method,
    *,
    batch: int = 1,
    dtype: str = "fp32",
    device: str = "auto",
    images: Tensor | Images | None = None,
    seed: int = 0,
) -> str:
    """Explain a method's time by operator, next to its oracle; arguments are those of speed."""
    device = machine.device_of(device)
    _check((batch,), (dtype,), LEAST_ROUNDS, quick=False)
    lineup = _Lineup(model, [method], device, False, seed)
    needed = batch + CALIBRATION_IMAGES
    pictures = images_for(lineup.channels, lineup.size, needed, seed + 1000, images)
    with torch.no_grad():
        lineup.prepare(dtype, pictures)
    with torch.inference_mode():
        cell = lineup.cell(pictures.take(batch), "default")
        name, about = list(cell.facts.items())[-1]
        ours, oracle = cell.calls[name], cell.calls[about["oracle"]]
        return (
            f"{name} against its oracle: {dtype}, batch {batch}, {device}\n\n"
            f"{profiling.compare(ours, oracle, device)}\n\n{profiling.table(ours, device)}"
        )


def _modes(stack: ExitStack, compile: bool, device: str) -> None:
    """Set how calls run: without gradients, and compiled as they would be deployed."""
    if not compile:
        stack.enter_context(torch.inference_mode())
        return
    import torch._inductor.config as inductor

    # Freezing and inference tensors do not go together; without gradients both cost the same
    # once compiled.
    stack.enter_context(torch.no_grad())
    # Constant weights, as deployed; on a CPU the linear layers are packed for it.
    stack.enter_context(inductor.patch(freezing=device == "cpu"))


def _check(batches: Sequence[int], dtypes: Sequence[str], rounds: int, quick: bool) -> None:
    """Refuse what cannot be measured, and what would not be a result."""
    for what, values in (("batch", batches), ("dtype", dtypes)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"give at least one {what}, and each once; got {list(values)}")
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batches must be whole numbers from 1 on, got {batch!r}")
    for dtype in dtypes:
        check_choice("dtype", dtype, tuple(DTYPES))
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if rounds < LEAST_ROUNDS and not quick:
        raise ValueError(
            f"a result needs at least {LEAST_ROUNDS} rounds, got {rounds}; quick allows fewer, for "
            "a trial"
        )


@dataclass
class _Cell:
    """Calls of all variants at one batch size, and what to know of the methods."""

    calls: dict[str, Call] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    why_not_unfused: str | None = None


class _Lineup:
    """The model and its methods, in one dtype after another; cells differ in the batch."""

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method] | Mapping[str, Method],
        device: str,
        compile: bool,
        seed: int,
    ) -> None:
        self.given = model if isinstance(model, ReducedViT) else None
        self.device, self.compile, self.seed = device, compile, seed
        backbone = backbone_of(model)
        self.spec, self.channels = backbone.spec, backbone.channels
        rows, columns = (n * p for n, p in zip(self.spec.grid, self.spec.patch, strict=True))
        self.size = (rows, columns)
        self.original = backbone.model
        self.methods = self._named(methods)
        self.left_out: dict[str, str] = {}
        self.vit: nn.Module = self.original
        self.models: dict[str, ReducedViT] = {}
        self.parameters: dict[str, str | None] = {}

    def _named(self, methods: Sequence[Method] | Mapping[str, Method]) -> dict[str, Method]:
        if isinstance(methods, (str, Reducer, ReducedViT)):
            raise ValueError(f"methods must be a list or a mapping, got {methods!r}")
        pairs: list[tuple[str, Method]] = []
        if self.given is not None:
            pairs.append((repr(self.given.reducer), self.given))
        if isinstance(methods, Mapping):
            pairs += methods.items()
        else:
            pairs += [(_name(method), method) for method in methods]
        for place, (name, method) in enumerate(pairs):
            if name in (DENSE, AGAIN, UNFUSED) or name.startswith("oracle of "):
                raise ValueError(f"{name!r} is the name of another variant; name the method else")
            if name in (earlier for earlier, _ in pairs[:place]):
                raise ValueError(f"{name} is given twice; name methods apart with a mapping")
            if isinstance(method, ReducedViT) and method.backbone.spec != self.spec:
                raise ValueError(
                    f"{name} runs on another architecture than the dense model; it must be the same"
                )
        return dict(pairs)

    def prepare(self, dtype: str, pictures: Images) -> None:
        """Make copies of everything in a dtype, on the device."""
        to: dict[str, Any] = {"device": self.device, "dtype": DTYPES[dtype]}
        copied: dict[int, Any] = {}  # what is shared stays shared
        self.models.clear()
        self.vit = copy.deepcopy(self.original, copied).to(**to).eval().requires_grad_(False)
        for name, method in self.methods.items():
            fresh = not isinstance(method, ReducedViT)
            if isinstance(method, ReducedViT):
                model = copy.deepcopy(method, copied).to(**to)
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed)
                    model = api.apply(self.vit, method)
            model.eval().requires_grad_(False)
            if self.compile and not model.reducer.fixed_count:
                self.left_out[name] = "it has a count per image, which is not compiled"
                continue
            self.models[name] = model
            self.parameters[name] = self._ready(model, fresh, pictures)

    def _ready(self, model: ReducedViT, fresh: bool, pictures: Images) -> str | None:
        """Set the gates that nobody has trained; say how the method's parameters came about."""
        new = any(True for _ in model.reducer.parameters())
        if not fresh:
            return "as saved" if new else None
        last = len(pictures.pixels) - CALIBRATION_IMAGES
        images = pictures.take(CALIBRATION_IMAGES, max(0, last))
        reference = next(model.parameters())
        if calibrate(model, images.to(reference.device, reference.dtype)):
            return "untrained, scaled and shifted to their target share"
        return "untrained" if new else None

    def cell(self, images: Tensor, compile_mode: str) -> _Cell:
        """Time all variants on these images."""
        images = images.to(self.device, next(self.vit.parameters()).dtype)
        found = _Cell()
        for name in (DENSE, AGAIN):
            found.calls[name] = self._call(self.vit, images, compile_mode)
        try:
            twin = unfused(self.vit, images)
        except ValueError as error:
            found.why_not_unfused = str(error)
        else:
            found.calls[UNFUSED] = self._call(twin, images, compile_mode)
        known: dict[tuple[Any, ...], str] = {}
        for name, model in self.models.items():
            trace = model.trace(images)
            counts = Counts.of(trace)
            oracle = Oracle.of(model, trace, images)
            same = (oracle.even, id(model.vit), counts)
            if same not in known:  # methods with one schedule share the oracle
                known[same] = f"oracle of {name}"
                found.calls[known[same]] = self._call(oracle, images, compile_mode)
            found.calls[name] = self._call(model, images, compile_mode)
            found.facts[name] = {
                "oracle": known[same],
                "tokens": counts.summary(),
                "macs": _cost_ratio(model, trace, images),
                "acting_blocks": len(model.reducer.active_blocks),
                "depth": self.spec.depth,
                "parameters": self.parameters[name],
            }
        return found

    def _call(self, model: nn.Module, images: Tensor, compile_mode: str) -> Call:
        def run() -> Any:
            return model(images)

        if not self.compile:
            return run
        # A code object of its own for each variant, so that none of them waits for the guards
        # of the others.
        fresh = types.FunctionType(
            run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
        )
        return torch.compile(fresh, fullgraph=True, dynamic=False, mode=compile_mode)


def _cost_ratio(model: ReducedViT, trace: Trace, images: Tensor) -> float:
    """Return multiply-adds over the dense model's, on these images where counts depend on them."""
    try:
        return facts.count(model, trace=trace).ratio
    except ValueError:  # a method that does not work out its own cost is counted by running
        return facts.count(model, images=images).ratio


def _name(method: Method) -> str:
    if isinstance(method, str):
        return method.strip()
    return repr(method.reducer if isinstance(method, ReducedViT) else method)
