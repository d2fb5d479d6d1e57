"""Export a model with its method to a file that runs without foveate.

The folder OUT gets the model, model.json (preprocessing, labels), infer.py, which runs the model on
images, and a README. The written file is run once to count the tokens that its blocks really
compute.

The formats:
  onnx      for onnxruntime (the default): pip install 'foveate[onnx]'
  openvino  for OpenVINO, the fastest on most CPUs: pip install 'foveate[openvino]'
  pt2       for torch, where foveate is not installed

In a terminal:
  foveate export deit_small_patch16_224 "evit(keep=0.7)" evit/
  foveate export deit_small_patch16_224 evit evit8/ --format openvino --int8 --calibrate photos/
  foveate export runs/reduce-photos out/ --check --images photos/
  foveate export demo "tome(r=3)" out/ --format openvino --int8 --check --beside onnx pt2
  foveate export deit_small_patch16_224 evit fast/ --format openvino --budget "1.5x faster"
  foveate export runs/detect-scenes_svit backbone/ --image-size 64
"""

from __future__ import annotations

import argparse

from foveate.cli.convert import image_size
from foveate.cli.models import MODEL, add_untrained
from foveate.cli.threads import add_threads, check_threads

__all__ = ["add_arguments", "run"]

_FORMATS = ("onnx", "openvino", "pt2")  # those of foveate.exports, which starts slowly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    parser.usage = "foveate export MODEL [METHOD] OUT [options]"
    add("model", metavar="MODEL", help=MODEL)
    add(
        "rest",
        nargs="*",
        default=[],
        metavar="[METHOD] OUT",
        help='method to apply, such as "evit(keep=0.7)", unless the model has one; and the folder '
        "to write",
    )
    parser.set_defaults(more="rest")
    add(
        "--format",
        choices=_FORMATS,
        default="onnx",
        help="what to write (default: onnx)",
    )
    add(
        "--int8",
        action="store_true",
        help="compute matrix products in 8 bits; needs --calibrate, except for the demo models",
    )
    add(
        "--calibrate",
        nargs="+",
        metavar="PATH",
        help="image files and folders to fit the ranges of 8 bits to; 128 images are enough",
    )
    add(
        "--batch",
        default="dynamic",
        metavar="N",
        help="a fixed number of images in a call, or dynamic for any (default; detectors and "
        "segmenters: 1)",
    )
    add(
        "--image-size",
        type=image_size,
        metavar="N or HxW",
        help="size of the images of a detector or segmenter (default: its own)",
    )
    add("--opset", type=int, metavar="N", help="version of ONNX's operators (default: torch's)")
    add(
        "--check",
        action="store_true",
        help="compare the answers with torch's, and time both beside the model without a method",
    )
    add(
        "--images",
        nargs="+",
        metavar="PATH",
        help="image files and folders to compare on (default: those of --calibrate, or synthetic "
        "ones)",
    )
    add(
        "--beside",
        nargs="+",
        choices=_FORMATS,
        default=(),
        metavar="FORMAT",
        help="further formats that --check times in the same run, to see which runtime is the "
        "fastest here: " + ", ".join(_FORMATS),
    )
    add(
        "--rounds",
        type=int,
        default=30,
        metavar="N",
        help="number of timed rounds (default: 30, the fewest that a claim needs; 0 for none)",
    )
    add(
        "--budget",
        metavar="TIME",
        help="set the method's rate so that a call of the exported model takes this time on this "
        "machine: '1.5x faster' (than the dense model exported alike), '12 ms', '20 ms, batch 8'",
    )
    add_threads(parser)
    add_untrained(parser)


def run(args: argparse.Namespace) -> int:
    """Export, and say what was found; give 1 if the check failed."""
    if len(args.rest) not in (1, 2):
        given = f", got {' '.join(args.rest)}" if args.rest else ""
        raise ValueError(f"give MODEL, METHOD if the model has none, and the folder OUT{given}")
    from foveate.registry import list_methods

    if len(args.rest) == 1 and args.rest[0].partition("(")[0] in list_methods():
        raise ValueError(
            f"{args.rest[0]} is a method, and the folder OUT is missing; a folder of that name is "
            f"./{args.rest[0]}"
        )
    if args.images and not args.check:
        raise ValueError("--images are compared on, which --check asks for")
    if args.beside and not (args.check and args.rounds):
        raise ValueError(
            "--beside names formats to time, which --check does, with --rounds above 0"
        )
    if args.calibrate and not args.int8:
        raise ValueError("--calibrate is for --int8")
    check_threads(args)
    batch = _batch(args.batch)
    from foveate import machine

    if args.check or args.budget:
        machine.tune_malloc("cpu")
    from pathlib import Path

    from foveate.bench.progress import progress_bar
    from foveate.cli.models import open_models
    from foveate.exports import export

    *methods, out = args.rest
    (model,) = open_models(args.model, methods, untrained=args.untrained)
    with progress_bar() as progress:
        found = export(
            model,
            out,
            format=args.format,
            int8=args.int8,
            calibrate=args.calibrate,
            batch=batch,
            image_size=args.image_size,
            opset=args.opset,
            check=args.check,
            images=args.images,
            beside=args.beside,
            rounds=args.rounds,
            threads=args.threads,
            budget=args.budget,
            name=Path(args.model).name,
            progress=progress,
        )
    print(f"tokens   {' '.join(map(str, found.tokens))}, counted in the file while it ran")
    for note in found.notes:
        print(f"note     {note}")
    if found.check is not None:
        print("\n".join(found.check.lines()))
    print(f"wrote    {found.file} ({found.size / 1e6:.1f} MB), infer.py and README.md beside it")
    print(f"try      python {found.folder / 'infer.py'} PHOTO")
    return 0 if found.check is None or found.check.passed else 1


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"--batch must be dynamic or a number from 1, got {text!r}")
    return number
