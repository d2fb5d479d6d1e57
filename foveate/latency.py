"""Budgets in time, from how long blocks take by number of tokens on this machine.

A table is measured once for a model, a batch, a number format and a machine, and kept in a file. It
predicts a method's time from its tokens per block, and so the rate that meets a time. Then the
model is timed beside the dense one, and the rate is corrected until the time is met.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate import machine
from foveate.core import Backbone, ReducedViT, Reducer, TokenState, dense
from foveate.core.budget import priced, rate_for
from foveate.core.cost import BlockTokens, run_on_meta, tokens_of
from foveate.core.selection import Selection
from foveate.files import read_json, write_text
from foveate.timing import DENSE, DTYPES, Timings, measure

__all__ = [
    *("LatencyTable", "Setting", "TimeBudget", "WithoutWeights", "approach", "beside_dense"),
    *("goal_of", "is_time", "own_work", "setting_of", "solve_time_budget", "time_calls"),
]

# Shares of the patches with which blocks are timed.
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1, 0.05)
_ROUNDS, _WARMUP, _SAMPLE_MS = 15, 2, 20.0
_ATTEMPTS, _NEAR, _PROMISE = 6, 0.015, 0.05
_SOLVED = 0.03  # how near predictions must come; not nearer, since numbers of tokens are whole
_FASTER = re.compile(r"(\d*\.?\d+)\s*(?:x|times)\s+(?:as\s+fast|faster)", re.IGNORECASE)
_ABSOLUTE = re.compile(r"(\d*\.?\d+)\s*(ms|s)", re.IGNORECASE)
_FORMAT = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """The conditions that a time holds for.

    Attributes:
        batch: number of images in a pass.
        dtype: "fp32", "bf16" or "fp16".
        device: device of the model.
        threads: CPU threads; 0 on a GPU.
    """

    batch: int
    dtype: str
    device: str
    threads: int

    def __str__(self) -> str:
        threads = "1 CPU thread" if self.threads == 1 else f"{self.threads} CPU threads"
        where = threads if self.threads else self.device
        return f"batch {self.batch}, {self.dtype}, {where}"


@dataclass(frozen=True)
class TimeBudget:
    """A time that a pass may take.

    Attributes:
        value: milliseconds, or how many times as fast as the dense model.
        relative: whether ``value`` is the latter.
        batch: number of images in a pass.
        dtype: number format; None for the model's own.
    """

    value: float
    relative: bool
    batch: int = 1
    dtype: str | None = None

    @classmethod
    def parse(cls, text: str) -> TimeBudget:
        """Read "1.5x faster", "12 ms", or either with more: "12 ms, batch 8, bf16"."""
        first, *rest = (part.strip() for part in text.split(","))
        options: dict[str, Any] = {}
        for part in rest:
            if part in DTYPES:
                options["dtype"] = part
            elif found := re.fullmatch(r"batch\s*(\d+)", part, re.IGNORECASE):
                options["batch"] = int(found[1])
            else:
                raise ValueError(
                    f"{part!r} in the budget {text!r} is neither a batch ('batch 8') nor one of "
                    f"{', '.join(DTYPES)}; foveate export --format chooses a runtime"
                )
        if options.get("batch", 1) < 1:
            raise ValueError(f"the batch of a budget must be at least 1, got {text!r}")
        if faster := _FASTER.fullmatch(first):
            value = float(faster[1])
            if value <= 1:
                raise ValueError(f"a budget must be more than 1x faster, got {text!r}")
            return cls(value, True, **options)
        absolute = _ABSOLUTE.fullmatch(first)
        if absolute is None or float(absolute[1]) == 0:
            raise ValueError(f"a time reads like '1.5x faster' or '12 ms', got {text!r}")
        value = float(absolute[1]) * (1000 if absolute[2].lower() == "s" else 1)
        return cls(value, False, **options)

    def __str__(self) -> str:
        return f"{self.value:g}x faster" if self.relative else f"{self.value:g} ms"

    def goal(self, dense_ms: float) -> float:
        """Return the milliseconds that it allows if a dense pass takes ``dense_ms``."""
        return dense_ms / self.value if self.relative else self.value

    def needless(self, dense_ms: float, where: str) -> ValueError:
        """Make the error for a model that is within it without a method."""
        return ValueError(
            f"the model takes {dense_ms:.3g} ms ({where}) without a method, which is within {self}"
        )


class WithoutWeights(ValueError):
    """A budget in time for a model on the meta device, in which all else is right."""


def is_time(budget: str) -> bool:
    """Tell a budget in time from one in multiply-adds."""
    first = budget.partition(",")[0].strip() if isinstance(budget, str) else ""
    return bool(_FASTER.fullmatch(first) or _ABSOLUTE.fullmatch(first))


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model on this machine.

    Attributes:
        setting: conditions of the times.
        tokens: numbers of tokens of an image, in rising order.
        block_ms: milliseconds that a block takes with each of these numbers.
        rest_ms: milliseconds of everything outside the blocks: embedding, norm, head.
        machine: name of the processor.
        malloc_tuned: whether malloc was tuned, as the commands that measure tune it.
    """

    setting: Setting
    tokens: tuple[int, ...]
    block_ms: tuple[float, ...]
    rest_ms: float
    machine: str
    malloc_tuned: bool = False

    def __post_init__(self) -> None:
        times = (*self.block_ms, self.rest_ms)
        if not all(isinstance(ms, (int, float)) and ms >= 0 for ms in times):
            raise ValueError("times are numbers from 0")
        if not self.tokens or len(self.tokens) != len(self.block_ms):
            raise ValueError("there is one time for each number of tokens")

    def __str__(self) -> str:
        tuned = ", malloc tuned" if self.malloc_tuned else ""
        return f"{self.setting}{tuned}"

    def predict(self, tokens: Sequence[float]) -> float:
        """Return the milliseconds of a pass, without the method's own work.

        Args:
            tokens: number of tokens in each block.
        """
        return float(np.interp(tokens, self.tokens, self.block_ms).sum()) + self.rest_ms

    def whole(self, depth: int) -> float:
        """Return the milliseconds of a pass without a method through ``depth`` blocks."""
        return self.predict([self.tokens[-1]] * depth)

    def predict_pass(self, blocks: Sequence[BlockTokens], own_ms: float = 0.0) -> float:
        """Return the milliseconds of a pass with a method.

        Args:
            blocks: tokens of each block.
            own_ms: the method's own work in a block where it acts (``own_work``).
        """
        mean = [(block.attention + block.mlp) / 2 for block in blocks]
        return self.predict(mean) + own_ms * self.acting(blocks)

    def acting(self, blocks: Sequence[BlockTokens]) -> int:
        """Count the blocks in which tokens leave or come back."""
        now, found = self.tokens[-1], 0
        for block in blocks:
            counts = (block.attention, block.mlp, block.output)
            found += any(count != now for count in counts)
            now = block.output
        return found

    @classmethod
    def of(cls, backbone: Backbone, setting: Setting, *, fresh: bool = False) -> LatencyTable:
        """Return the table of a model: a kept one, or a new one that is kept.

        Args:
            backbone: parts of the model.
            setting: conditions of the times.
            fresh: measure again even if a table exists.
        """
        known = None if fresh else cls.known(backbone, setting)
        if known is not None:
            return known
        table = _measured(backbone, setting)
        of = _what(backbone, setting.device)
        _keep(_path(backbone, setting), {"format": _FORMAT, "of": of, **dataclasses.asdict(table)})
        return table

    @classmethod
    def known(cls, backbone: Backbone, setting: Setting) -> LatencyTable | None:
        """Return the kept table of a model, or None."""
        path = _path(backbone, setting)
        return cls._read(path, read_json(path, "")) if path.exists() else None

    @classmethod
    def all_known(cls, backbone: Backbone) -> list[LatencyTable]:
        """Return all tables that are kept of a model, measured with today's versions."""
        devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
        wanted = {_what(backbone, device) for device in devices}
        found = []
        for path in sorted(_folder().glob(f"{_family(backbone)}-*.json")):
            content = read_json(path, "")
            if isinstance(content, dict) and content.get("of") in wanted:  # no other model's
                found.append(cls._read(path, content))
        return sorted(found, key=lambda table: (table.setting.device, table.setting.batch))

    @classmethod
    def _read(cls, path: Path, found: Any) -> LatencyTable:
        try:
            if found.pop("format") != _FORMAT:
                raise KeyError("format")
            found.pop("of")
            found["setting"] = Setting(**found["setting"])
            found["tokens"], found["block_ms"] = tuple(found["tokens"]), tuple(found["block_ms"])
            return cls(**found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a latency table: delete it") from error


def _what(backbone: Backbone, device: str) -> str:
    """Return a hash of a model and of the versions and processor that its times depend on."""
    facts = machine.facts(device)
    versions = {name: facts.get(name) for name in ("cpu", "gpu", "torch", "foveate", "system")}
    return _hashed([_FORMAT, dataclasses.astuple(backbone.spec), versions])


def _hashed(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]


def _path(backbone: Backbone, setting: Setting) -> Path:
    """Return the file of a table; its name is a hash of all that its numbers depend on."""
    tuned = not machine.malloc_untuned(setting.device)
    name = _hashed([_what(backbone, setting.device), dataclasses.astuple(setting), tuned])
    return _folder() / f"{_family(backbone)}-{name}.json"


def _family(backbone: Backbone) -> str:
    return backbone.spec.family.replace(" ", "-")


def _folder() -> Path:
    root = os.environ.get("FOVEATE_CACHE") or Path.home() / ".cache" / "foveate"
    return Path(root) / "latency"


def _keep(path: Path, content: Any) -> None:
    """Write a file of the cache; where that cannot be, say so and go on without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        _log.warning(
            "times cannot be kept in %s (%s) and are measured again each time; the variable "
            "FOVEATE_CACHE names another folder",
            *(path.parent, error.strerror or error),
        )


def setting_of(backbone: Backbone, batch: int = 1, dtype: str | None = None) -> Setting:
    """Return the setting in which a model would run as it is."""
    like = next(backbone.model.parameters())
    names = {kind: name for name, kind in DTYPES.items()}
    if dtype is None and like.dtype not in names:
        raise ValueError(f"times are measured in {', '.join(DTYPES)}; the model has {like.dtype}")
    device = like.device.type
    threads = torch.get_num_threads() if device == "cpu" else 0
    return Setting(batch, dtype or names[like.dtype], device, threads)


# Measuring ---------------------------------------------------------------------------------------


@torch.no_grad()
def _measured(backbone: Backbone, setting: Setting) -> LatencyTable:
    """Time all blocks at several numbers of tokens, and the whole dense pass."""
    model, images = _ready(dense(backbone), setting)
    spec = backbone.spec
    whole = model.begin(images)
    counts = sorted({max(1, round(share * spec.grid[0] * spec.grid[1])) for share in _SHARES})
    calls: dict[str, Callable[[], Any]] = {"pass": partial(model, images)}
    for count in counts:
        positions = torch.arange(count, device=images.device).expand(len(images), -1)
        calls[str(count)] = partial(_blocks, model, whole.keep(Selection(positions)))
    with torch.inference_mode():
        timings = time_calls(calls, setting.device)
    blocks = [timings.ms(str(count)).median / spec.depth for count in counts]
    blocks = np.maximum.accumulate(blocks).tolist()  # only noise makes more tokens faster
    return LatencyTable(
        setting,
        tuple(spec.prefix + count for count in counts),
        tuple(blocks),
        max(0.0, timings.ms("pass").median - blocks[-1] * spec.depth),
        machine.name(machine.facts(setting.device)),
        not machine.malloc_untuned(setting.device),
    )


def _blocks(model: ReducedViT, state: TokenState) -> TokenState:
    for block in range(model.backbone.spec.depth):
        state = model.step(block, state)
    return state


def _ready(model: ReducedViT, setting: Setting) -> tuple[ReducedViT, torch.Tensor]:
    """Return a copy of a model as it would run, and images for it."""
    model = copy.deepcopy(model).to(DTYPES[setting.dtype]).eval().requires_grad_(False)
    spec, channels = model.backbone.spec, model.backbone.channels
    rows, columns = (n * p for n, p in zip(spec.grid, spec.patch, strict=True))
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, channels, rows, columns, generator=noise)
    return model, images.to(setting.device, DTYPES[setting.dtype])


def time_calls(
    calls: Mapping[str, Callable[[], Any]],
    device: str,
    rounds: int = _ROUNDS,
    progress: Callable[[int, int], None] | None = None,
    settle: bool = False,
) -> Timings:
    """Time calls together, by default in as many rounds as a budget in time needs.

    ``settle`` is for calls that have threads of their own, as ``foveate.timing.measure`` says.
    """
    return measure(
        calls,
        rounds=rounds,
        warmup=_WARMUP,
        sample_ms=_SAMPLE_MS,
        device=device,
        settle=settle,
        progress=progress,
    )


# Meeting a time ----------------------------------------------------------------------------------


def solve_time_budget(
    budget: str, backbone: Backbone, make: Callable[[Mapping[str, Any]], Reducer]
) -> Reducer:
    """Return the method at the rate at which a pass, timed now, is within 5 % of the budget.

    Gates that decide for each image are timed keeping as many tokens as their rates say. Those
    rates are what the method is trained to keep, so this is the latency-aware training of SPViT.

    Args:
        budget: as ``TimeBudget.parse`` reads it.
        backbone: parts of the model.
        make: builds the method from options that override the user's; called many times.
    """
    wanted = TimeBudget.parse(budget)
    template = make({})
    counted = not template.fixed_count and hasattr(template, "gate")
    timed: dict[str, Any] = {"gate": "topk"} if counted else {}
    if not make(timed).fixed_count:
        raise ValueError(
            f"the time of {template.name} depends on the images, because it keeps a different "
            "number of tokens in each: give a budget in multiply-adds"
        )
    if next(backbone.model.parameters()).is_meta:
        raise WithoutWeights("a model on the meta device cannot be timed: give multiply-adds")
    setting = setting_of(backbone, wanted.batch, wanted.dtype)
    return make(_met(wanted, setting, backbone, lambda options: make({**timed, **options})))


def goal_of(wanted: TimeBudget, setting: Setting, backbone: Backbone) -> tuple[LatencyTable, float]:
    """Return a model's table and the goal of a budget in milliseconds.

    Raise ValueError if the model meets the budget without a method.
    """
    for fresh in (False, True):  # a kept table may come from a day when the machine was faster
        table = LatencyTable.of(backbone, setting, fresh=fresh)
        whole = table.whole(backbone.spec.depth)
        goal = wanted.goal(whole)
        if goal < whole * (1 + _PROMISE):
            return table, goal
    raise wanted.needless(whole, str(setting))


def _met(
    wanted: TimeBudget,
    setting: Setting,
    backbone: Backbone,
    make: Callable[[Mapping[str, Any]], Reducer],
) -> Mapping[str, Any]:
    """Return the options that meet a time."""
    spec = backbone.spec
    table, _ = goal_of(wanted, setting, backbone)

    def predicted(reducer: Reducer) -> float:
        return table.predict_pass(run_on_meta(spec, reducer, spec.grid).tokens)

    def timed(options: Mapping[str, Any]) -> tuple[float, float]:
        reducer = make(options)
        reducer.build(spec)
        return _compared(backbone, reducer, setting)

    return approach(wanted, str(setting), table.whole(spec.depth), backbone, make, predicted, timed)


def approach(
    wanted: TimeBudget,
    where: str,
    whole: float,
    backbone: Backbone,
    make: Callable[[Mapping[str, Any]], Reducer],
    predicted: Callable[[Reducer], float],
    timed: Callable[[Mapping[str, Any]], tuple[float, float]],
) -> Mapping[str, Any]:
    """Return the options that meet a time: predict, run, correct the prediction, and again.

    Args:
        wanted: the time.
        where: its conditions in words.
        whole: predicted milliseconds of a pass without a method.
        backbone: parts of the model.
        make: builds the method from options that override the user's; called many times.
        predicted: gives the milliseconds of a pass with a method, without its own work.
        timed: gives the milliseconds of a pass with these options and without a method, measured
            together.
    """
    best: Mapping[str, Any] = {}
    cost_of = priced(backbone, make, predicted)
    # ``extra`` is the method's own work, which no prediction knows. ``scale`` is how much slower
    # the machine is than when predictions were made.
    extra, scale, miss, target = 0.0, 1.0, float("inf"), wanted.goal(whole)
    for _ in range(_ATTEMPTS):
        said = partial(_milliseconds, extra, scale)
        options = rate_for(max(target - extra, 0.0), backbone, make, cost_of, said, _SOLVED)
        reached, dense_ms = timed(options)
        goal = wanted.goal(dense_ms)
        if abs(reached / goal - 1) < miss:
            best, miss = options, abs(reached / goal - 1)
        if miss <= _NEAR:
            break
        scale = dense_ms / whole
        extra, target = reached / scale - cost_of(options), goal / scale
    if miss > _PROMISE:
        raise ValueError(
            f"{make(best).name} was timed {_ATTEMPTS} times and came no nearer than {miss:.0%} to "
            f"{wanted} ({where}): the machine may be busy with other work"
        )
    return best


def _milliseconds(extra: float, scale: float, predicted: float) -> str:
    return f"{scale * (predicted + extra):.3g} ms"


def _compared(backbone: Backbone, reducer: Reducer, setting: Setting) -> tuple[float, float]:
    """Return the milliseconds of a pass with the method and of the model without it."""
    timings = beside_dense(backbone, {"method": reducer}, setting)
    return timings.ms("method").median, timings.ms(DENSE).median


@torch.no_grad()
def beside_dense(
    backbone: Backbone,
    reducers: Mapping[str, Reducer],
    setting: Setting,
    *,
    rounds: int = _ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Time passes with some methods and the model without any ("dense"), interleaved.

    Args:
        backbone: parts of the model; a copy of it is timed.
        reducers: the methods by name, built for the model.
        setting: how the model runs.
        rounds: rounds that count.
        progress: called between rounds with the number of rounds that are done, and of all rounds.
    """
    bare, images = _ready(dense(backbone), setting)
    shared = bare.backbone  # one copy of the weights for all
    driver: type[ReducedViT] = shared.driver or ReducedViT
    like = next(shared.model.parameters())
    calls: dict[str, Callable[[], Any]] = {DENSE: partial(shared.model, images)}
    for name, reducer in reducers.items():
        own = copy.deepcopy(reducer).to(like.device, like.dtype).requires_grad_(False)
        calls[name] = partial(driver(shared, own).eval(), images)
    with torch.inference_mode():
        return time_calls(calls, setting.device, rounds, progress)


def own_work(
    backbone: Backbone,
    table: LatencyTable,
    reducers: Mapping[str, Reducer],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Return the milliseconds of each method's own work, for a block where it acts.

    The own work is the time of a pass beyond the table's prediction. It is timed once for a method
    and kept in a file beside the table.

    Args:
        backbone: parts of the model.
        table: table of the model.
        reducers: the methods, built for the model, by names that contain all their options.
        progress: called between rounds with the number of rounds that are done, and of all rounds.
    """
    path = _path(backbone, table.setting).with_suffix(".own.json")
    known: dict[str, float] = read_json(path, "") if path.exists() else {}
    new = {name: one for name, one in reducers.items() if name not in known}
    if new:
        timings = beside_dense(backbone, new, table.setting, progress=progress)
        scale = timings.ms(DENSE).median / table.whole(backbone.spec.depth)
        for name, reducer in new.items():
            blocks = tokens_of(backbone.spec, reducer)
            more = timings.ms(name).median / scale - table.predict_pass(blocks)
            known[name] = more / max(1, table.acting(blocks))
        _keep(path, known)
    return {name: known[name] for name in reducers}
