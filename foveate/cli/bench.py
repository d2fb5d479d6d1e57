"""Measure the speed and memory of methods beside the dense model.

The dense model (without a method) runs with torch's fused attention and also un-fused. Beside each
METHOD runs its oracle, which keeps as many tokens by slicing, without choosing them: no choice can
be faster. All of them are timed once in every round, in random order. The table has the ratios to
the dense model, round by round, with their 95 % interval. The dense model is timed twice a round
(A/A), and a method is called faster only if it gains more than those two differ. On a CPU the
command restarts itself with a tuned malloc, and says so.

In a terminal:
  foveate bench deit_small_patch16_224 evit "tome(r=13)" --untrained
  foveate bench deit_small_patch16_224 evit dynamicvit --batch 1 8 32 --dtype fp32 bf16 --untrained
  foveate bench demo "evit(keep=0.7)" "ats(K=20)" --quick
  foveate bench svit/ --images photos/ --out svit.json --plot svit.png
  foveate bench runs/detect-scenes svit --images photos/ --batch 1
  foveate bench vit.safetensors evit --device cuda --compile --batch 32 --dtype bf16
  foveate bench --compare svit.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.cli.models import add_model, add_untrained
from foveate.cli.threads import add_threads, check_threads, prepare_timing

if TYPE_CHECKING:
    from foveate.bench import Result

__all__ = ["add_arguments", "run"]

_PLOTS = (".pdf", ".png", ".svg")
_QUICK_ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add_model(parser, needed=False)
    add("--batch", type=int, nargs="+", metavar="N", help="batch sizes to time (default: 1 8 32)")
    add(
        "--dtype",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=["fp32"],
        help="number formats of weights and images (default: fp32)",
    )
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default)")
    add(
        "--compile",
        action="store_true",
        help="time compiled models, not eager ones; only for methods that keep the same number of "
        "tokens in every image",
    )
    add(
        "--compile-mode",
        default="default",
        metavar="MODE",
        help="mode of torch.compile, such as reduce-overhead",
    )
    add(
        "--images",
        nargs="+",
        metavar="PATH",
        help="image files and folders, for methods whose token count depends on the image",
    )
    add(
        "--rounds",
        type=int,
        metavar="N",
        help="number of timed rounds (default: 30, the fewest that a claim needs)",
    )
    add_threads(parser)
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of images, gates and order (default: 0)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file for the result; the table of every round is written beside it",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="file for a picture of the result: .png, .svg or .pdf",
    )
    add_untrained(parser)
    add(
        "--quick",
        action="store_true",
        help="run 3 rounds at batch 1 and 2, to see that it works",
    )
    add(
        "--profile",
        action="store_true",
        help="show how much time each operator takes with one METHOD",
    )
    add(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="compare the methods of saved results; only results of one run can be compared",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, or compare what was measured."""
    if args.compare:
        if args.model is not None:
            raise ValueError("--compare reads saved results; leave MODEL and METHOD out")
        from foveate.measure.benchmark import load, pairs
        from foveate.measure.sheets import show, terminal

        console = terminal()
        for sheet in pairs([load(Path(path)) for path in args.compare]):
            show(sheet, console)
        return
    if args.model is None:
        raise ValueError("name a MODEL, or saved results with --compare")
    if args.plot is not None and args.plot.suffix not in _PLOTS:
        raise ValueError(f"{args.plot}: plots are written as {', '.join(_PLOTS)}")
    check_threads(args)
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    prepare_timing(args)
    from foveate.files import made_folder

    with made_folder(args.out and args.out.parent), made_folder(args.plot and args.plot.parent):
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    from foveate import bench, machine
    from foveate.bench.progress import progress_bar
    from foveate.convert import open_base
    from foveate.measure.benchmark import cell_sheet, closing, figure, opening, table_of
    from foveate.measure.sheets import show, terminal
    from foveate.measure.style import save

    model = open_base(args.model, untrained=args.untrained)
    batches = args.batch or ([1, 2] if args.quick else [1, 8, 32])
    images = None
    if args.images:
        images = bench.read_images(model, args.images, max(batches) + bench.CALIBRATION_IMAGES)
    if args.profile:
        if len(args.methods) != 1:
            raise ValueError("--profile explains one METHOD; name one")
        found = bench.explain(
            model,
            args.methods[0],
            batch=batches[0],
            dtype=args.dtype[0],
            device=args.device,
            images=images,
            seed=args.seed,
        )
        print(found)
        return
    console = terminal()

    def finished(result: Result) -> None:
        results = table_of(result)
        if args.out is not None:
            results.save(args.out)
        if len(result.cells) == 1:
            console.print("\n".join(opening(results)), markup=False)
        show(cell_sheet(results), console)

    with progress_bar() as progress:
        result = bench.speed(
            model,
            args.methods,
            batches=batches,
            dtypes=args.dtype,
            rounds=args.rounds or (_QUICK_ROUNDS if args.quick else 30),
            warmup=1 if args.quick else 3,
            sample_ms=0.0 if args.quick else 20.0,
            device=args.device,
            compile=args.compile,
            compile_mode=args.compile_mode,
            images=images,
            seed=args.seed,
            name=Path(args.model).name,
            command=machine.command("foveate"),
            notes={"weights": "random" if args.untrained else "as given"},
            quick=args.quick,
            progress=progress,
            finished=finished,
        )
    results = table_of(result)
    console.print("\n".join(closing(results)), markup=False)
    if args.plot is not None:
        save(figure(results), args.plot)
    for path in (args.out, args.plot):
        if path is not None:
            print(f"wrote    {path}")
