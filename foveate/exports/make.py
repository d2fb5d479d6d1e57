"""Export a model: one file that a runtime runs, and what belongs beside it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
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
from foveate.data import Inputs
from foveate.dense import DenseModel, Hosting
from foveate.exports.check import Check, compare, speeds
from foveate.exports.folder import write_about, write_readme, write_script
from foveate.exports.graph import Graph, answers, capture, fixed
from foveate.exports.infer import open_model
from foveate.exports.pictures import Paths, for_calibration, for_check
from foveate.facts import count
from foveate.machine import physical_cores, version_of
from foveate.timing import AGAIN, DENSE, LEAST_ROUNDS

__all__ = ["FORMATS", "Exported", "export"]

FORMATS = ("onnx", "openvino", "pt2")
_FORMAT = 1
_SEED = 4321
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        folder: where it is.
        file: the model in it.
        about: what ``model.json`` says.
        tokens: tokens that each block computed when the file was run.
        notes: what is otherwise than in the model that was given.
        check: how it compares with torch; None if that was not asked for.
    """

    folder: Path
    file: Path
    about: Mapping[str, Any] = field(repr=False)
    tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()
    check: Check | None = field(default=None, repr=False)

    def open(self, threads: int = 0, batch: int = 0) -> Callable[[np.ndarray], list[np.ndarray]]:
        """Return what runs the file on preprocessed images ``[B, C, H, W]``.

        Args:
            threads: of the CPU; 0 leaves it to the runtime.
            batch: number of images that calls will have, if it is known.
        """
        return open_model(self.folder, threads, batch)[0]


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
    rounds: int = LEAST_ROUNDS,
    threads: int | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as a file that a runtime runs, with all that running it takes.

    The folder gets the model, ``model.json`` (preprocessing, labels), ``infer.py``, which runs it
    without foveate, and a README. The file is run once to count the tokens that its blocks really
    compute: were they not those of the method, that would be an error.

    Args:
        model: a plain ViT or one from ``foveate.apply``; a detector or segmenter, of which the
            backbone is exported; or what commands take as MODEL.
        out: folder to write, made if it is missing.
        format: "onnx" for onnxruntime, "openvino", or "pt2" for torch.
        int8: compute matrix products in 8 bits. What the method decides with stays in float32.
        calibrate: images that 8 bits are fitted to: paths, or preprocessed ones ``[N, C, H, W]``;
            128 are enough. Models of Fashion-MNIST take the images that ship.
        batch: a fixed number of images; None for any, or for one if the model is a dense one.
        image_size: side, or height and width, of a dense model's images; None for its own.
        opset: version of ONNX's operators; None for the one that torch prefers.
        check: compare with torch, on images, and time both beside the dense model.
        images: those to compare on, as for ``calibrate``; those, or synthetic ones, if None.
        rounds: timed rounds; 0 times nothing.
        threads: CPU threads of timed calls; the physical cores if None.
        name: what to call the model in the README.
        progress: told what is done, and how much of it.
    """
    made = _format(format, int8, batch, rounds, opset)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check_installed(made, int8)
    say = progress or _silent
    if not isinstance(model, nn.Module):
        name = name or Path(model).name
        model = open_base(os.fspath(model))
    if isinstance(model, Hosting):
        batch = batch or 1  # images of a batch are taken apart, so its number is part of the graph
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / made.FILE
    pixels = for_calibration(model, calibrate) if int8 else None
    with fixed(model) as changed:
        say("capturing", 0, 1)
        graph = capture(model, batch, size)
        _written(made, graph, path, pixels, opset, say)
        probe = torch.randn(
            batch or 2, graph.channels, *graph.size, generator=torch.Generator().manual_seed(_SEED)
        )
        tokens = made.tokens(path, graph.layers, probe.numpy())
        if tokens != graph.tokens:
            raise ValueError(
                f"{path} computes {tokens} tokens in its blocks and not {graph.tokens}: the method "
                "is not in effect there"
            )
        about = _about(model, graph, made, int8, name, tuple(filter(None, [changed])))
        write_about(folder, about)
        write_script(folder)
        exported = Exported(folder, path, MappingProxyType(about), tokens, tuple(about["notes"]))
        if check:
            pictures, source = for_check(model, graph, images if images is not None else calibrate)
            found = compare(
                answers(model),
                exported.open(threads or 0, batch or 0),
                pictures,
                batch=batch,
                int8=int8,
                source=source,
            )
            if rounds:
                found = _timed(model, exported, graph, found, made, pixels, rounds, threads, say)
            exported = replace(exported, check=found)
    shapes = [f"`{n}`, [{', '.join(s)}]" for n, s in zip(graph.outputs, graph.shapes, strict=True)]
    write_readme(folder, about, shapes, exported.check)
    return exported


# What can be asked for ---------------------------------------------------------------------------


def _format(format: str, int8: bool, batch: int | None, rounds: int, opset: int | None) -> Any:
    check_choice("format", format, FORMATS)
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch must be a whole number from 1, or None for any, got {batch!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be a whole number from 0, got {rounds!r}")
    made: ModuleType = importlib.import_module(f"foveate.exports.{format}")
    if int8 and format == "pt2":
        raise ValueError("int8 is for onnx and openvino: eager torch gains nothing from it")
    if opset is not None:
        if format == "pt2":
            raise ValueError("opset is a version of ONNX's operators: pt2 has none")
        from foveate.exports.onnx import LEAST_OPSET

        if opset < LEAST_OPSET:
            raise ValueError(f"opset must be at least {LEAST_OPSET}, got {opset}")
    return made


def _check_installed(made: Any, int8: bool) -> None:
    needs = [name for name in made.NEEDS if int8 or name != "nncf"]
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        extra = made.__name__.rpartition(".")[2]
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'foveate[{extra}]'")


# Writing -----------------------------------------------------------------------------------------


def _written(
    made: Any,
    graph: Graph,
    path: Path,
    pixels: np.ndarray | None,
    opset: int | None,
    say: Progress,
) -> None:
    say("writing", 0, 1)
    options = {} if opset is None else {"opset": opset}
    made.write(graph, path, **options)
    if pixels is not None:
        say("fitting 8 bits", 0, 1)
        made.quantise(path, graph, pixels)


def _about(
    model: nn.Module, graph: Graph, made: Any, int8: bool, name: str | None, notes: tuple[str, ...]
) -> dict[str, Any]:
    reduced = model.reduced if isinstance(model, Hosting) else model
    reducer = reduced.reducer if isinstance(reduced, ReducedViT) else None
    method = None if reducer is None or reducer.name == "dense" else repr(reducer)
    if int8 and not _has_vnni():
        notes += (
            "this machine's processor has no instructions for products of 8 bits (VNNI or AMX): "
            "the model runs here, but hardly faster than in float32",
        )
    if isinstance(model, Hosting):
        notes += (
            f"the backbone alone, with its maps, for batches of {graph.batch} images of "
            f"{graph.size[0]} x {graph.size[1]}; heads stay in torch",
        )
    return {
        "format": _FORMAT,
        "foveate": version_of("foveate"),
        "runtime": made.RUNTIME,
        "file": made.FILE,
        "int8": int8,
        "input": "images",
        "batch": graph.batch,
        "channels": graph.channels,
        **_preparation(model, graph),
        "outputs": list(graph.outputs),
        "labels": _labels(model),
        "model": name or type(getattr(reduced, "vit", reduced)).__name__,
        "method": method,
        "tokens": list(graph.tokens),
        "macs": _macs(model, graph, method),
        "notes": list(notes),
    }


def _preparation(model: nn.Module, graph: Graph) -> dict[str, Any]:
    """Say how pictures become the model's input; a dense model's are stretched to its size."""
    if isinstance(model, Hosting):
        mean, std = (0.0,) * graph.channels, (1.0,) * graph.channels
        if isinstance(model, DenseModel):
            mean, std = tuple(model.transform.image_mean), tuple(model.transform.image_std)
        crop_pct, interpolation = None, "bilinear"
    else:
        inputs = Inputs.of(model)
        mean, std = inputs.mean, inputs.std
        crop_pct, interpolation = inputs.crop_pct, inputs.interpolation
    return {
        "size": list(graph.size),
        "mean": list(mean),
        "std": list(std),
        "crop_pct": crop_pct,
        "interpolation": interpolation,
    }


def _labels(model: nn.Module) -> list[str] | None:
    names = None if isinstance(model, Hosting) else class_names(model)
    return None if names is None else list(names)


def _macs(model: nn.Module, graph: Graph, method: str | None) -> str:
    inside = model.trunk if isinstance(model, DenseModel) else model
    found = count(inside, graph.size)
    said = f"{found.macs / 1e9:.2f} G an image"
    return said if method is None else f"{said}, {found.ratio:.2f} of the dense model's"


def _has_vnni() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # another system, which does not say
    return any(flag in text for flag in ("vnni", "amx_int8", "asimddp", "i8mm"))


# Timing ------------------------------------------------------------------------------------------


def _timed(
    model: nn.Module,
    exported: Exported,
    graph: Graph,
    found: Check,
    made: Any,
    pixels: np.ndarray | None,
    rounds: int,
    threads: int | None,
    say: Progress,
) -> Check:
    """Add the times of the exported model, of the model in torch, and of both without method."""
    threads, batch = threads or physical_cores(), graph.batch or 1
    runtime, method = made.RUNTIME, exported.about["method"]
    precision = " int8" if exported.about["int8"] else ""
    example = torch.randn(batch, graph.channels, *graph.size)
    values, before = example.numpy(), torch.get_num_threads()
    plain = unwrap(model) if isinstance(model, ReducedViT | Hosting) else model
    ask = exported.open(threads, batch)
    dense, reduced = answers(plain), answers(model)
    calls: dict[str, Callable[[], Any]] = {
        DENSE: lambda: dense(example),
        AGAIN: lambda: dense(example),
    }
    with tempfile.TemporaryDirectory() as place:
        if method is not None:
            say("exporting the dense model, to be timed", 0, 1)
            other = Path(place)
            size = graph.size if isinstance(model, Hosting) else None
            twin = capture(plain, graph.batch, size)
            _written(made, twin, other / made.FILE, pixels, None, say)
            write_about(other, {**exported.about, "batch": batch})
            beside = open_model(other, threads, batch)[0]
            calls[method] = lambda: reduced(example)
            calls[f"dense, {runtime}{precision}"] = lambda: beside(values)
        calls[f"{method or DENSE}, {runtime}{precision}, exported"] = lambda: ask(values)
        torch.set_num_threads(threads)
        try:
            with evaluating(plain, model):
                times = speeds(calls, rounds, lambda done, of: say("timing", done, of))
        finally:
            torch.set_num_threads(before)
    return replace(found, batch=batch, threads=threads, rounds=rounds, speeds=times)


def _silent(what: str, done: int, of: int) -> None:
    return None
