"""Measure methods against the dense model, fused and un-fused, and against their oracles."""

from __future__ import annotations

import gc
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate import machine
from foveate.bench import profiling
from foveate.bench.images import Images
from foveate.bench.lineup import CALIBRATION_IMAGES, DTYPES, Method, lineup_of
from foveate.bench.memory import peak_memory
from foveate.bench.result import Cell, Result
from foveate.core.schedule import check_choice
from foveate.timing import LEAST_ROUNDS, measure

__all__ = ["Progress", "explain", "speed"]

_log = logging.getLogger(__name__)

# Called with what is measured, the number of rounds done, and the number of all rounds.
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
    the same token counts by slicing. The given model is not changed. A detector, a segmenter or a
    dense backbone has a run for its backbone and one for the whole network; these have no un-fused
    variant, and the network has no oracles, since what a head costs depends on what it is shown.

    Args:
        model: a plain ViT, or a model from ``apply``, whose own method is then measured too; or a
            dense model.
        methods: strings such as "evit(keep=0.7)", methods, or models from ``apply`` of the same
            architecture, which stay as they are; a mapping gives them names.
        batches: batch sizes.
        dtypes: any of "fp32", "bf16", "fp16"; dense models have the last two by autocast.
        rounds: number of rounds that count, at least 30.
        warmup: number of rounds before them, which do not count.
        sample_ms: least milliseconds of one sample; a shorter call is repeated.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        compile: run compiled instead of eagerly; methods with a count per image are left out.
        compile_mode: mode of ``torch.compile``.
        images: preprocessed images ``[N, C, H, W]`` for methods with a count per image; those of
            detectors and segmenters have values from 0 to 1 and any size. None takes Fashion-MNIST
            for models of grey 28 x 28 images, else synthetic ones.
        seed: seed of images, new parameters and the order within rounds.
        name: name of the model.
        command: command that was typed, for the record.
        notes: further settings for the record.
        quick: whether fewer rounds are allowed, for a trial.
        progress: called after every round of a cell.
        finished: called after every cell with the result so far.
    """
    device = machine.device_of(device)
    _check(batches, dtypes, rounds, quick)
    if machine.malloc_untuned(device):
        _log.warning(
            "malloc is not tuned: times are longer and noisier than they need to be; foveate bench "
            "tunes it, or start Python with the settings in foveate/machine.py"
        )
    lineup = lineup_of(model, methods, device, compile, seed)
    pictures = lineup.pictures(max(batches) + CALIBRATION_IMAGES, images)
    name = name or type(lineup.original).__name__
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
            for part in lineup.parts:
                whole = f"{name} {part}".rstrip()
                with ExitStack() as stack:
                    _modes(stack, compile, device)
                    stack.enter_context(lineup.autocast(dtype))
                    cell = lineup.cell(pictures.take(batch), part, compile_mode)
                    title = f"{whole}, {dtype}, batch {batch}"
                    for done, call in enumerate(cell.calls.values()):  # compile, and fill caches
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
                about = cell.facts, cell.why_not_unfused, memory, uuid.uuid4().hex
                result.cells.append(Cell(whole, dtype, batch, compile, timings, *about))
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
    """Explain a method's time by operator, next to its oracle; arguments as for ``speed``."""
    device = machine.device_of(device)
    _check((batch,), (dtype,), LEAST_ROUNDS, quick=False)
    lineup = lineup_of(model, [method], device, False, seed)
    pictures = lineup.pictures(batch + CALIBRATION_IMAGES, images)
    with torch.no_grad():
        lineup.prepare(dtype, pictures)
    with torch.inference_mode(), lineup.autocast(dtype):
        cell = lineup.cell(pictures.take(batch), lineup.parts[0], "default")
        name, about = list(cell.facts.items())[-1]
        ours, oracle = cell.calls[name], cell.calls[about["oracle"]]
        return (
            f"{name} against its oracle: {dtype}, batch {batch}, {device}\n\n"
            f"{profiling.compare(ours, oracle, device)}\n\n{profiling.table(ours, device)}"
        )


def _modes(stack: ExitStack, compile: bool, device: str) -> None:
    """Set how calls run: without gradients, and if compiled, as in deployment."""
    if not compile:
        stack.enter_context(torch.inference_mode())
        return
    import torch._inductor.config as inductor

    # Freezing does not work with inference tensors; once compiled, no_grad costs the same.
    stack.enter_context(torch.no_grad())
    # Make weights constant, as in deployment; on a CPU this packs those of linear layers.
    stack.enter_context(inductor.patch(freezing=device == "cpu"))


def _check(batches: Sequence[int], dtypes: Sequence[str], rounds: int, quick: bool) -> None:
    """Raise ValueError for settings that cannot be measured, and for too few rounds."""
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
