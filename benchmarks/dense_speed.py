"""Measure SViT in detectors: its blocks, ViT-Adapter around them, and Mask R-CNN as a whole.

    python benchmarks/dense_speed.py --photos PHOTOS/ --out dense_speed.json
    python benchmarks/dense_speed.py --models t --levels blocks backbone parts
    python benchmarks/dense_speed.py --device cuda --dtypes bf16 --photos PHOTOS/ --out dense.json

The models are ViT-Adapter-T and -S (DeiT-Ti and DeiT-S without a class token) at 800 x 1333, batch
1. Weights are random, as speed does not depend on them; the gates of SViT are set so that they keep
the paper's rates over the photographs that are measured. Rounds take one photograph after another,
and all variants of a round take the same one. Levels:

    blocks    the ViT's blocks: dense, dense in windows of 14 with four global blocks, SViT
    backbone  the same with ViT-Adapter around them
    network   Mask R-CNN, dense and SViT; the class scores are scaled so that objects are found
    packed    SViT's backbone on a batch of 4, against the four images one by one
    parts     where the time of the backbone goes: stem, injectors, extractors, blocks, gates

Each level is one interleaved run with the dense model twice (A/A). The reference of ``packed`` is
the same images one by one. The oracle takes the first tokens, as many as SViT, and has no gates.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import foveate
from foveate import machine
from foveate.bench import DTYPES, Result
from foveate.bench.images import natural_images
from foveate.bench.memory import peak_memory
from foveate.bench.oracle import Counts, Oracle
from foveate.bench.progress import progress_bar
from foveate.bench.result import Cell
from foveate.bench.run import Progress
from foveate.core import GatedReducer, ReducedViT
from foveate.data import ImageFiles
from foveate.dense import Canvas, ViTAdapter, adapter, calibrate, mask_rcnn, windowed
from foveate.measure import Results, frame
from foveate.measure.benchmark import table_of
from foveate.measure.sheets import Sheet, show, terminal
from foveate.measure.table import formatted, grid, pd, rows, select
from foveate.timing import AGAIN, DENSE, LEAST_ROUNDS, measure, median_of

MODELS = {"t": "deit_tiny_patch16_224", "s": "deit_small_patch16_224", "tiny": ""}
LEVELS = ("blocks", "backbone", "network", "packed", "parts")
# Goals: speed over dense, and the largest share of gates, gather and scatter in SViT's backbone.
GOALS = {("t", "blocks"): 1.7, ("s", "blocks"): 1.85, ("t", "backbone"): 1.25}
GOALS |= {("s", "backbone"): 1.35, ("t", "packed"): 1.0, ("s", "packed"): 1.0}
MOST_GATES = 0.05
WINDOWED, SVIT, ORACLE, PACKED = "dense, windows of 14", "svit", "oracle of svit", "svit, packed"
Call = Callable[[], Any]


def photographs(args: argparse.Namespace, count: int) -> tuple[Tensor, str]:
    """Return images ``[count, 3, H, W]`` with values from 0 to 1, and their source."""
    height, width = args.size
    if not args.photos:
        made = natural_images(count, (height, width), args.seed)
        return (0.5 + 0.25 * made).clamp(0, 1), "synthetic, 1/f noise with flat regions"
    found = []
    for _, image in ImageFiles(args.photos):
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255)
        if len(found) == count:
            return torch.stack(found), f"photographs, cut and resized to {height} x {width}"
    raise ValueError(f"--photos has {len(found)} images, but {count} are needed")


class Lineup:
    """A ViT and what is built on it, in one dtype on one device."""

    def __init__(self, key: str, dtype: str, args: argparse.Namespace, photos: Tensor) -> None:
        torch.manual_seed(args.seed)
        if key == "tiny":
            options: dict[str, Any] = {"patch_size": 16, "embed_dim": 48, "num_heads": 3}
            self.vit: nn.Module = timm.models.VisionTransformer(
                img_size=64, depth=12, class_token=False, global_pool="avg", **options
            )
        else:
            self.vit = timm.create_model(MODELS[key], class_token=False, global_pool="avg")
        self.key, self.dtype, self.args, self.name = key, dtype, args, f"vit_adapter_{key}"
        self.dense = adapter(self.vit)
        self.svit: ViTAdapter = foveate.apply(self.dense, "svit")
        for model in (self.dense, self.svit):
            model.to(args.device, DTYPES[dtype]).eval().requires_grad_(False)
        windows = windowed(self.vit, size=14, every=3)
        self.windowed = self.dense.with_method(lambda vit: windows)
        self.photos = photos.to(args.device)
        mean, std = (
            photos.new_tensor(values)[:, None, None]
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        normed = ((photos - mean) / std).to(args.device, DTYPES[dtype])
        self.images = normed.split(1)
        # Fresh injectors add nothing, so the ViT alone has the tokens that it has in the adapter.
        calibrate(self.svit.body, self.padded())
        self.counts: list[Counts] = []
        self.oracles: list[ViTAdapter] = []  # one a photograph
        for image in self.images:
            trace = self.svit.trace(image)
            self.counts.append(Counts.of(trace))
            oracle = Oracle.of(self.svit.reduced, trace, image)
            self.oracles.append(self.dense.with_method(lambda vit, oracle=oracle: oracle))

    @property
    def adapters(self) -> dict[str, list[ViTAdapter]]:
        """The backbones by the names of their rows, one for each photograph."""
        single = {DENSE: self.dense, AGAIN: self.dense, WINDOWED: self.windowed, SVIT: self.svit}
        several = {name: [model] * len(self.images) for name, model in single.items()}
        return {**several, ORACLE: self.oracles}

    def padded(self) -> list[Tensor]:
        """Return the photographs as the ViT inside the adapter gets them."""
        patch, multiple = self.dense.body.backbone.spec.patch, self.dense.multiple
        return [Canvas.of(image, patch, multiple).images for image in self.images]

    def blocks(self) -> dict[str, Call]:
        """Return calls of the ViT's blocks alone, from embedded patches on."""
        return {
            name: in_turn([_blocks(m.body, i) for m, i in zip(models, self.padded(), strict=True)])
            for name, models in self.adapters.items()
        }

    def backbone(self) -> dict[str, Call]:
        """Return calls of ViT-Adapter."""
        return {
            name: in_turn([partial(m, i) for m, i in zip(models, self.images, strict=True)])
            for name, models in self.adapters.items()
        }

    def network(self) -> dict[str, Call]:
        """Return calls of Mask R-CNN; bfloat16 is by autocast, as not all of it computes in it."""
        trunk, reduced = copy.deepcopy((self.dense, self.svit.reduced))  # one ViT in both
        dense = mask_rcnn(trunk, 80, **self.args.network).to(self.args.device).float().eval()
        dense.requires_grad_(False)
        svit = dense.with_method(lambda vit: reduced.float())

        def call(model: nn.Module, photo: Tensor) -> Any:
            with self._autocast():
                return model([photo])

        # Random scores are all alike, so no object would be found and the mask head would not run.
        scores = dense.roi_heads.box_predictor.cls_score
        for _ in range(12):
            if len(call(dense, self.photos[0])[0]["boxes"]) >= dense.roi_heads.detections_per_img:
                break
            scores.weight.mul_(2)
        models = {DENSE: dense, AGAIN: dense, SVIT: svit}
        return {
            name: in_turn([partial(call, model, photo) for photo in self.photos])
            for name, model in models.items()
        }

    def packed(self) -> dict[str, Call]:
        """Return calls of SViT on a batch, and on its images one by one."""
        each = self.images[: self.args.batch]
        together = torch.cat(each)

        def one_by_one() -> None:
            for image in each:
                self.svit(image)

        return {DENSE: one_by_one, AGAIN: one_by_one, PACKED: partial(self.svit, together)}

    def _autocast(self) -> Any:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.args.device, DTYPES[self.dtype])

    def about(self) -> dict[str, Any]:
        """Return what the table says about SViT besides its times."""
        last = [n for counts in self.counts for n in counts.mlp[-1]]
        counted = foveate.count(self.svit, images=[image[0] for image in self.images])
        return {
            "oracle": ORACLE,
            "tokens": {
                "fed_mean_per_block": [round(n, 1) for n in counted.tokens],
                "fed_last_block_min": min(last),
                "fed_last_block_max": max(last),
            },
            "macs": counted.ratio,
            "acting_blocks": len(self.svit.reducer.active_blocks),
            "depth": self.svit.body.backbone.spec.depth,
            "parameters": "untrained, shifted to their target share",
        }


def in_turn(calls: Sequence[Call]) -> Call:
    """Make one call from several, which runs the next one each time."""
    turns = cycle(calls)
    return lambda: next(turns)()


def _blocks(body: ReducedViT, image: Tensor) -> Call:
    begun = body.begin(image, track=True)

    def call() -> None:
        state = begun
        for block in range(body.backbone.spec.depth):
            state = body.step(block, state)

    return call


class Clock:
    """Measures the time of named parts of a model; parts may contain each other.

    Attributes:
        spent: milliseconds of each part since the last call of ``take``.
    """

    def __init__(self, model: ViTAdapter, device: str) -> None:
        self.spent: dict[str, float] = {}
        self._sync = torch.cuda.synchronize if device == "cuda" else _nothing
        body, reducer = model.body, model.body.reducer
        self._watch(model.prior, "forward", "stem")
        for name, modules in (
            ("injectors", model.injectors),
            ("extractors", [*model.extractors, *model.extra_extractors]),
        ):
            for module in modules:
                self._watch(module, "forward", name)
        self._watch(body, "begin", "embedding")
        self._watch(body, "step", "blocks")
        if isinstance(reducer, GatedReducer):
            self._watch(reducer, "before", "gates and gather")
            self._watch(reducer, "after", "scatter")
        self._model = model

    def take(self, image: Tensor) -> dict[str, float]:
        """Run once and return milliseconds by part; "rest" is in no part, "all" is everything."""
        self.spent.clear()
        self._timed("all", self._model, image)
        outer = ("stem", "injectors", "extractors", "embedding", "blocks")
        return {**self.spent, "rest": self.spent["all"] - sum(self.spent[n] for n in outer)}

    def _watch(self, module: nn.Module, name: str, part: str) -> None:
        # The instance's attribute hides the method of the class.
        vars(module)[name] = partial(self._timed, part, getattr(module, name))

    def _timed(self, part: str, call: Call, *args: Any, **options: Any) -> Any:
        self._sync()
        start = time.perf_counter()
        result = call(*args, **options)
        self._sync()
        self.spent[part] = self.spent.get(part, 0.0) + 1e3 * (time.perf_counter() - start)
        return result


def _nothing() -> None:
    return None


def parts(lineup: Lineup, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Return rows with the time of the backbone's parts; the models take turns."""
    found: list[dict[str, Any]] = []
    shared: dict[str, Any] = {"run": f"{lineup.name} parts, {lineup.dtype}", "at": 1}
    models = {name: copy.deepcopy(lineup.adapters[name][0]) for name in (DENSE, SVIT)}
    clocks = {name: Clock(model, args.device) for name, model in models.items()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in clocks}
    for turn in range(-1, args.rounds):
        image = lineup.images[turn % len(lineup.images)]
        for name, clock in clocks.items():
            times = clock.take(image)
            if turn >= 0:
                taken[name].append(times)
        progress(shared["run"], turn + 1, args.rounds)
    for name, passes in taken.items():
        for number, times in enumerate(passes):
            found += rows("rounds", times, method=name, draw=number, **shared)
        medians = {part: statistics.median(t[part] for t in passes) for part in passes[0]}
        found += rows("parts", medians, method=name, **shared)
    gates = [(t["gates and gather"] + t["scatter"]) / t["all"] for t in taken[SVIT]]
    share = median_of(gates)
    values = {"gates": share.median, "gates_low": share.low, "gates_high": share.high}
    goal = {} if lineup.key == "tiny" else {"goal_gates": MOST_GATES}
    return found + rows("parts", values | goal, method=SVIT, **shared)


def level(lineup: Lineup, what: str, args: argparse.Namespace, progress: Progress) -> Cell:
    """Measure one level in an interleaved run."""
    calls, name = getattr(lineup, what)(), f"{lineup.name} {what}"
    timings = measure(
        calls,
        rounds=args.rounds,
        warmup=1,
        sample_ms=0.0,
        device=args.device,
        seed=args.seed,
        progress=partial(progress, f"{name}, {lineup.dtype}"),
    )
    memory = {key: peak_memory(call, args.device) for key, call in calls.items()}
    batch = args.batch if what == "packed" else 1
    methods = {SVIT: lineup.about()} if ORACLE in calls else {}
    why = "not measured"
    run = uuid.uuid4().hex
    return Cell(name, lineup.dtype, batch, False, timings, methods, why, memory, run)


def judged(result: Result, extra: Sequence[dict[str, Any]]) -> Results:
    """Return the table with goals; a goal also counts as reached within the A/A spread."""
    results, found = table_of(result), [*extra]
    for cell in result.cells:
        key, what = cell.model.removeprefix("vit_adapter_").split()
        goal = GOALS.get((key, what))
        method = PACKED if what == "packed" else SVIT
        values = {"goal_times": goal}
        found += rows("speed", values, run=cell.setting, at=cell.batch, method=method)
        if what == "packed":  # its reference is not a dense model
            own = results.table["run"] == cell.setting
            named = {"": "svit, one by one", AGAIN: "svit, one by one again"}
            results.table.loc[own, "method"] = results.table.loc[own, "method"].replace(named)
    where = results.table[["commit", "machine"]].iloc[0].to_dict() if len(results.table) else {}
    where = where or {"commit": result.commit, "machine": machine.name(result.machine)}
    results.table = pd.concat([results.table, frame(found, **where)], ignore_index=True)
    return results


def report(results: Results) -> list[Sheet]:
    """Return the table for the terminal."""
    sheets = []
    for (run, at), own in select(results.table, part="speed").groupby(["run", "at"], sort=False):
        wide = grid(own, "method")
        spread, noise = wide["spread"].max(), wide["spread"].max()
        table = pd.DataFrame(
            {
                "variant": [name or DENSE for name in wide.index],
                "ms": formatted(wide["ms"], ".1f"),
                "times the reference [95 %]": [
                    f"{line.times:.3f} [{line.times_low:.3f}, {line.times_high:.3f}]"
                    for line in wide.itertuples()
                ],
                "peak": formatted(wide["memory"], ".2f"),
                "goal": [
                    ""
                    if pd.isna(goal := line.get("goal_times"))
                    else f"{goal:.2f} {_verdict(line['times'], goal, noise)}"
                    for _, line in wide.iterrows()
                ],
            }
        ).fillna("")
        title = f"{run}, batch {at:g}: A/A spread {spread:.1%}"
        sheets.append(Sheet(title, table, ("variant", "times the reference [95 %]", "goal")))
    for run, own in select(results.table, part="parts").groupby("run", sort=False):
        wide = grid(own, "metric", "method")
        gates = wide.loc["gates", SVIT]
        notes = [f"gates, gather and scatter: {gates:.1%} of SViT's backbone"]
        if "goal_gates" in wide.index:
            goal = wide.loc["goal_gates", SVIT]
            notes[0] += f" (goal: under {goal:.0%}, {'reached' if gates < goal else 'missed'})"
        shown = [name for name in wide.index if not name.startswith(("gates_", "goal_"))]
        wide = wide.loc[[name for name in shown if name != "gates"]]
        table = pd.DataFrame(
            {
                "part": list(wide.index),
                **{name or DENSE: formatted(wide[name], ".1f") for name in wide},
            }
        ).fillna("")
        sheets.append(Sheet(f"{run}: ms", table, ("part",), notes))
    return sheets


def _verdict(value: float, goal: float, noise: float) -> str:
    if value >= goal:
        return "reached"
    return "within A/A spread" if value >= goal * (1 - noise) else "missed"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", choices=("t", "s"), nargs="+", default=["t", "s"])
    add("--levels", choices=LEVELS, nargs="+", default=list(LEVELS))
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtypes", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    add("--size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"))
    add("--photos", nargs="+", metavar="PATH", help="photographs (default: synthetic images)")
    add("--images", type=int, default=6, help="number of images to measure on")
    add("--batch", type=int, default=4, help="number of images in the packed batch")
    add("--rounds", type=int, default=LEAST_ROUNDS)
    add("--threads", type=int, help="number of CPU threads (default: physical cores)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file, with a table beside it, rewritten after every level")
    add("--quick", action="store_true", help="smoke test: tiny model and images, 3 rounds")
    args = parser.parse_args()
    if not 1 <= args.batch <= args.images:
        parser.error(f"--batch must lie in 1..{args.images} (--images), got {args.batch}")
    args.network = {}
    if args.quick:
        args.models, args.rounds, args.size = ["tiny"], 3, [64, 90]
        small = {"channels": 32, "box_channels": 32, "mask_channels": 8, "detections": 4}
        args.network = {**small, "proposals": (20, 20)}
    elif args.rounds < LEAST_ROUNDS:
        parser.error(f"a result needs at least {LEAST_ROUNDS} rounds; --quick runs a trial")
    args.network["image_size"] = (min(args.size), max(args.size))
    return args


def main() -> None:
    args = arguments()
    machine.tune_malloc(args.device, "dense_speed.py")
    torch.set_num_threads(args.threads or machine.physical_cores())
    photos, source = photographs(args, args.images)
    result = Result(
        machine.command("python benchmarks/dense_speed.py"),
        machine.commit(),
        machine.facts(args.device),
        {
            "quick": args.quick,
            "seed": args.seed,
            "warmup_rounds": 1,
            "least_sample_ms": 0.0,
            "gradients": "inference_mode",
            "size": args.size,
            "images": f"{source}: {args.images}, and the gates are set on them",
            "weights": "random, without a class token; class scores scaled until objects are found",
        },
    )
    extra: list[dict[str, Any]] = []
    with progress_bar() as progress, torch.inference_mode():
        for dtype in args.dtypes:
            for key in args.models:
                lineup = Lineup(key, dtype, args, photos)
                fed = zip(*(counts.mlp for counts in lineup.counts), strict=True)  # by block
                means = (statistics.fmean(n for (n,) in block) for block in fed)
                print(f"{lineup.name}, {dtype}: tokens {' '.join(f'{n:.0f}' for n in means)}")
                for what in args.levels:
                    if what == "parts":
                        extra += parts(lineup, args, progress)
                    else:
                        result.cells.append(level(lineup, what, args, progress))
                    if args.out is not None:
                        judged(result, extra).save(args.out)
                    gc.collect()
    for sheet in report(judged(result, extra)):
        show(sheet, terminal(120))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"dense_speed.py: {error}") from error
