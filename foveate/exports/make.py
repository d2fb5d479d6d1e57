"""Export a model: one file for a runtime, and the files beside it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.api import unwrap
from foveate.backbones import class_names
from foveate.convert import open_base
from foveate.core import ReducedViT
from foveate.core.evaluation import evaluating
from foveate.core.schedule import check_choice
from foveate.dense import DenseModel, Hosting
from foveate.exports.budget import at_time, read_budget
from foveate.exports.check import Check, compare, speeds
from foveate.exports.folder import (
    former_files,
    model_files,
    write_about,
    write_readme,
    write_script,
)
from foveate.exports.graph import Graph, answers, capture, fixed, input_size, reduced_of
from foveate.exports.infer import Run, open_model
from foveate.exports.onnx import LEAST_OPSET
from foveate.exports.pictures import SEED, Paths, for_calibration, for_check, preparation
from foveate.facts import count
from foveate.files import made_folder
from foveate.latency import TimeBudget
from foveate.machine import has_int8, physical_cores, version_of
from foveate.timing import AGAIN, DENSE, LEAST_ROUNDS

__all__ = ["FORMATS", "Exported", "export"]

FORMATS = ("onnx", "openvino", "pt2")
_FORMAT = 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        folder: folder that was written.
        file: the model's file in that folder.
        about: content of ``model.json``.
        tokens: tokens that each block computed when the file was run.
        notes: what differs from the given model, and what else to know about the file.
        check: comparison with torch; None if none was asked for.
    """

    folder: Path
    file: Path
    about: Mapping[str, Any] = field(repr=False)
    tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()
    check: Check | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Number of bytes of the model's file, and of its weights where they lie beside it."""
        return sum(path.stat().st_size for path in model_files(self.file))

    def open(
        self, threads: int = 0, batch: int = 0, bf16: bool = False
    ) -> Callable[[np.ndarray], list[np.ndarray]]:
        """Return a function that runs the file on preprocessed images ``[B, C, H, W]``.

        Args:
            threads: number of CPU threads; 0 leaves it to the runtime.
            batch: number of images in every call; 0 if it is not known.
            bf16: let OpenVINO compute in bfloat16, which a processor with instructions for it does
                faster and less exactly.
        """
        return open_model(self.folder, threads, batch, bf16)[0]


def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",
    int8: bool = False,
    calibrate: Tensor | Paths | None = None,
    batch: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    opset: int | None = None,
    check: bool = False,
    images: Tensor | Paths | None = None,
    beside: Sequence[str] = (),
    rounds: int = LEAST_ROUNDS,
    threads: int | None = None,
    budget: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as a file for a runtime, with everything that is needed to run it.

    The folder gets the model, ``model.json`` (preprocessing, labels), ``infer.py``, which runs it
    without foveate, and a README. The file is run once to count the tokens that its blocks really
    compute; it is an error if they are not those of the method.

    Args:
        model: a plain ViT or one from ``foveate.apply``; a detector or segmenter, of which the
            backbone is exported; or a string that commands take as MODEL.
        out: folder to write, made if it is missing.
        format: "onnx" for onnxruntime, "openvino", or "pt2" for torch.
        int8: whether matrix products compute in 8 bits. Those that the method scores tokens by
            stay in float32.
        calibrate: images that 8 bits are fitted to, of which the first 128 count: paths, or
            preprocessed images ``[N, C, H, W]``. Models of Fashion-MNIST take the images that ship.
        batch: fixed number of images in a call; None allows any number, and is 1 for a dense model.
        image_size: side, or height and width, of a dense model's images; None takes its own.
        opset: version of ONNX's operators; None takes the one that torch prefers.
        check: whether to compare the file with torch, and to time both beside the dense model.
        images: images to compare on, as for ``calibrate``; None takes those of ``calibrate``, or
            some that ship or are synthetic.
        beside: further formats that ``check`` times in the same run, exported for that alone; in 8
            bits too if the format has them.
        rounds: number of timed rounds; 0 skips the timing.
        threads: number of CPU threads of timed calls; None takes the physical cores.
        budget: time on this machine that a call of the exported model may take, to which the
            method's rate is set: "1.5x faster" than the dense model exported alike, "12 ms",
            "20 ms, batch 8". For this the model is exported and timed a few times.
        name: name of the model in the README and in ``model.json``.
        progress: called with the step, how much of it is done, and of how much.
    """
    _check_asked(format, int8, batch, rounds, opset)
    _check_beside(format, beside, int8, timed=check and rounds > 0)
    wanted = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(model, nn.Module):
        name = name or Path(model).name
        model = open_base(os.fspath(model))
    if isinstance(model, Hosting):
        batch = batch or 1  # the graph splits a batch into its images, so their number is fixed
    wanted_time = None if budget is None else read_budget(budget, model, batch)
    folder = Path(out)
    size = input_size(model, wanted)
    prepared = preparation(model, size)
    pixels = for_calibration(prepared, calibrate) if int8 else None
    # Read the images before the long work, so that a folder without images is reported first.
    compared = calibrate if images is None else images
    pictures = for_check(prepared, compared, batch) if check else None
    writer = _Writer(format, pixels, opset, progress)
    with made_folder(folder), fixed(model) as changed:
        notes = [changed] if changed else []
        if wanted_time is not None:
            model, said = _at_time(wanted_time, model, writer, prepared, batch, threads)
            notes.append(said)
        graph = writer.capture(model, batch, size)
        path = writer.write(graph, folder)
        tokens = writer.tokens(graph, path)
        about = _about(model, graph, writer, prepared, name, notes)
        stale = {*former_files(folder)} - {*model_files(path)}
        write_about(folder, about)
        for old in stale:
            old.unlink()
        write_script(folder)
        exported = Exported(folder, path, MappingProxyType(about), tokens, tuple(about["notes"]))
        if pictures is not None:
            ask = exported.open(threads or 0, batch or 0)
            found = compare(answers(model), ask, *pictures, graph=graph, int8=int8)
            if rounds:
                others = [_Writer(other, pixels, None, progress) for other in beside]
                times = _timed(model, exported, graph, [writer, *others], rounds, threads)
                found = replace(found, **times)
            exported = replace(exported, check=found)
    shapes = [f"`{n}`, [{', '.join(s)}]" for n, s in zip(graph.outputs, graph.shapes, strict=True)]
    write_readme(folder, about, shapes, exported.check)
    return exported


# Checks of the arguments -------------------------------------------------------------------------


def _check_asked(
    format: str, int8: bool, batch: int | None, rounds: int, opset: int | None
) -> None:
    check_choice("format", format, FORMATS)
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch must be a whole number from 1, or None for any, got {batch!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be a whole number from 0, got {rounds!r}")
    if int8 and format == "pt2":
        raise ValueError(
            "int8 is for onnx and openvino: torch.export cannot capture torch's 8-bit layers"
        )
    if opset is not None and format == "pt2":
        raise ValueError("opset is a version of ONNX's operators: pt2 has none")
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(f"opset must be at least {LEAST_OPSET}, got {opset}")
    _check_installed(format, int8)


def _check_beside(format: str, beside: Sequence[str], int8: bool, *, timed: bool) -> None:
    if beside and not timed:
        raise ValueError("beside names formats to time, which check does, with rounds above 0")
    for number, other in enumerate(beside):
        check_choice("beside", other, FORMATS)
        if other == format or other in beside[:number]:
            raise ValueError(f"beside names {other}, which is timed already")
        _check_installed(other, int8)


def _check_installed(format: str, int8: bool) -> None:
    needs = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnxscript", "openvino"]}
    needed = needs.get(format, []) + ["nncf"] * (int8 and format == "openvino")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'foveate[{format}]'")


# Writing -----------------------------------------------------------------------------------------


class _Writer:
    """Writes graphs in one format: the model, and the dense model that it is timed beside.

    Attributes:
        runtime: package that runs the format.
        file: name of the model's file.
        int8: whether matrix products compute in 8 bits.
        named: name of the runtime, followed by "int8" if products compute in 8 bits.
    """

    def __init__(
        self, format: str, pixels: np.ndarray | None, opset: int | None, progress: Progress | None
    ) -> None:
        made: Any = importlib.import_module(f"foveate.exports.{format}")
        pixels = pixels if hasattr(made, "quantise") else None
        self.runtime: str = made.RUNTIME
        self.file: str = made.FILE
        self.int8 = pixels is not None
        self.named = self.runtime + " int8" * self.int8
        self._made, self._pixels, self._progress = made, pixels, progress
        self._by_image = getattr(made, "BY_IMAGE", False)
        self._options = {} if opset is None else {"opset": opset}

    def say(self, what: str, done: int = 0, of: int = 1) -> None:
        """Report progress: the step, how much of it is done, and of how much."""
        if self._progress is not None:
            self._progress(what, done, of)

    def capture(self, model: nn.Module, batch: int | None, size: tuple[int, int]) -> Graph:
        """Capture a model in the form that suits the runtime."""
        self.say("capturing")
        return capture(model, batch, size, by_image=self._by_image)

    def write(self, graph: Graph, folder: Path) -> Path:
        """Write a graph into a folder and return its file."""
        path = folder / self.file
        self.say("writing")
        self._made.write(graph, path, **self._options)
        if self._pixels is not None:
            self.say("fitting 8 bits")
            self._made.quantise(path, graph, self._pixels)
        return path

    def open(
        self,
        model: nn.Module,
        about: Mapping[str, Any],
        folder: Path,
        threads: int,
        batch: int,
        counted: bool = False,
    ) -> Run:
        """Export a model for timing, and return a function that runs it.

        Args:
            model: model to export.
            about: content of ``model.json``.
            folder: folder to write.
            threads: number of CPU threads.
            batch: number of images in a call.
            counted: whether to make sure that the file computes the model's tokens.
        """
        rows, columns = about["size"]
        graph = self.capture(model, about["batch"], (rows, columns))
        path = self.write(graph, folder)
        if counted:
            self.tokens(graph, path)
        write_about(folder, about)
        return open_model(folder, threads, batch)[0]

    def tokens(self, graph: Graph, path: Path) -> tuple[int, ...]:
        """Run a file and return its blocks' tokens; raise ValueError if the graph has others."""
        self.say("counting tokens")
        noise = torch.Generator().manual_seed(SEED)
        images = torch.randn(graph.batch or 2, graph.channels, *graph.size, generator=noise)
        found: tuple[int, ...] = self._made.tokens(path, graph.layers, images.numpy())
        if found != graph.tokens:
            raise ValueError(
                f"{path} computes {found} tokens in its blocks instead of {graph.tokens}: the "
                "method has no effect in this file"
            )
        return found


def _about(
    model: nn.Module,
    graph: Graph,
    writer: _Writer,
    prepared: Mapping[str, Any],
    name: str | None,
    notes: list[str],
) -> dict[str, Any]:
    reduced = reduced_of(model)
    dense = reduced is None or reduced.reducer.name == "dense"
    method = None if reduced is None or dense else repr(reduced.reducer)
    if writer.int8 and not has_int8():
        notes.append(
            "the processor of this machine lacks instructions for 8-bit products (VNNI or AMX): "
            "the model runs here, but hardly faster than in float32"
        )
    if isinstance(model, Hosting):
        notes.append(
            f"the file has the backbone alone, which returns maps, for batches of {graph.batch} "
            f"images of {graph.size[0]} x {graph.size[1]}; the heads stay in torch"
        )
    return {
        "format": _FORMAT,
        "foveate": version_of("foveate"),
        "runtime": writer.runtime,
        "file": writer.file,
        "int8": writer.int8,
        "input": "images",
        "batch": graph.batch,
        **prepared,
        "outputs": list(graph.outputs),
        "labels": _labels(model),
        "model": name or type(model if reduced is None else reduced.vit).__name__,
        "method": method,
        "tokens": list(graph.tokens),
        "macs": _macs(model, graph, method),
        "notes": notes,
    }


def _labels(model: nn.Module) -> list[str] | None:
    names = None if isinstance(model, Hosting) else class_names(model)
    return None if names is None else list(names)


def _macs(model: nn.Module, graph: Graph, method: str | None) -> str:
    inside = model.trunk if isinstance(model, DenseModel) else model
    found = count(inside, graph.size)
    said = f"{found.macs / 1e9:.2f} G per image"
    return said if method is None else f"{said}, {found.ratio:.2f} of the dense model's"


# Timing ------------------------------------------------------------------------------------------


def _timed(
    model: nn.Module,
    exported: Exported,
    graph: Graph,
    writers: Sequence[_Writer],
    rounds: int,
    threads: int | None,
) -> dict[str, Any]:
    """Time the model in torch, the exported one, and other formats, all without a method too.

    Return the fields of ``Check`` about times.
    """
    writer, *others = writers
    threads, batch = threads or physical_cores(), graph.batch or 1
    method = exported.about["method"]
    example = torch.randn(batch, graph.channels, *graph.size)
    pixels = example.numpy()
    plain = unwrap(model) if isinstance(model, ReducedViT | Hosting) else model
    dense, reduced, ask = answers(plain), answers(model), exported.open(threads, batch)
    calls: dict[str, Callable[[], Any]] = {
        DENSE: lambda: dense(example),
        AGAIN: lambda: dense(example),
    }
    with ExitStack() as stack:

        def beside(variant: nn.Module, how: _Writer) -> Callable[[], Any]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            about = {**exported.about, "runtime": how.runtime, "file": how.file}
            run = how.open(variant, about, folder, threads, batch, counted=True)
            return lambda: run(pixels)

        if method is not None:
            calls[method] = lambda: reduced(example)
            calls[f"dense, {writer.named}"] = beside(plain, writer)
        calls[f"{method or DENSE}, {writer.named}, exported"] = lambda: ask(pixels)
        for other in others:
            calls[f"dense, {other.named}"] = beside(plain, other)
            if method is not None:
                calls[f"{method}, {other.named}"] = beside(model, other)
        with _torch_threads(threads), evaluating(plain, model):
            times = speeds(calls, rounds, partial(writer.say, "timing"))
    return {"batch": batch, "threads": threads, "rounds": rounds, "speeds": times}


def _at_time(
    wanted: TimeBudget,
    model: nn.Module,
    writer: _Writer,
    prepared: Mapping[str, Any],
    batch: int | None,
    threads: int | None,
) -> tuple[nn.Module, str]:
    """Return the model with the rate that meets a time in the runtime, and a note about it."""
    threads, images = threads or physical_cores(), batch or wanted.batch
    about = {**prepared, "input": "images", "runtime": writer.runtime, "file": writer.file}
    pixels = np.zeros((images, prepared["channels"], *prepared["size"]), np.float32)
    where = f"batch {images}, {threads} CPU threads, {writer.named}"
    with ExitStack() as stack:

        def exported(variant: nn.Module) -> Callable[[], Any]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            ask = writer.open(variant, {**about, "batch": batch}, folder, threads, images)
            return lambda: ask(pixels)

        stack.enter_context(_torch_threads(threads))
        found = at_time(wanted, model, where, exported)
    reduced = reduced_of(found)
    assert reduced is not None
    return found, f"{reduced.reducer!r} was set to meet {wanted} ({where})"


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Make torch use ``threads`` CPU threads, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
