"""Draw what methods do to images: patches kept, groups merged, depth, heat maps, a sheet.

The kinds of picture:
  sheet         a column for each method, a row for each image (the default)
  kept          the patches that take part in each stage, the others dimmed
  groups        merged patches, one colour a group
  depth         how many blocks worked on each patch
  brought-back  patches that are unused in a block and used by a later one
  heat          where the model itself looks, without any method

In a terminal:
  foveate show demo "evit(keep=0.7)" "tome(r=3)" --images photos/ --out sheet.png
  foveate show deit_small_patch16_224 "evit(keep=0.7)" --images cat.jpg --kind kept --out cat.png
  foveate show svit/ --images photos/ --kind brought-back --out pictures/
  foveate show runs/detect-scenes_svit --images photos/ --kind depth --out depth.png
  foveate show vit.safetensors --images cat.jpg --kind heat --out heat.png
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.models import add_model, add_untrained

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.data import ImageFiles

__all__ = ["add_arguments", "run"]

_KINDS = ("sheet", "kept", "groups", "depth", "brought-back", "heat")
_SUFFIXES = (".jpeg", ".jpg", ".pdf", ".png", ".tif", ".tiff", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add_model(parser)
    add("--images", nargs="+", required=True, metavar="PATH", help="image files and folders")
    add(
        "--out",
        type=Path,
        required=True,
        help="one .png file for all pictures, or a folder for a file each",
    )
    add("--kind", choices=_KINDS, default="sheet", help="kind of picture (default: sheet)")
    add(
        "--fit",
        choices=("stretch", "crop", "aspect"),
        default="stretch",
        help="how to fit an image to the model: stretch it to the model's size (default), crop its "
        "middle, or keep its aspect with about as many patches",
    )
    add(
        "--how",
        choices=("attention", "rollout", "relevance"),
        nargs="+",
        help="heat maps to draw (default: all that the model has)",
    )
    add(
        "--target",
        type=int,
        metavar="CLASS",
        help="number of the class that relevance explains (default: the predicted one)",
    )
    add("--strict", action="store_true", help="stop at the first image that cannot be read")
    add_untrained(parser)


def run(args: argparse.Namespace) -> None:
    """Draw and write."""
    if args.kind != "heat" and (args.how is not None or args.target is not None):
        raise ValueError(f"--how and --target are for --kind heat, got --kind {args.kind}")
    one_file = bool(args.out.suffix) and not args.out.is_dir()
    if one_file and args.out.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{args.out}: pictures are written as {', '.join(_SUFFIXES)}")
    folder = args.out.parent if one_file else args.out
    from foveate.files import made_folder

    with made_folder(folder):
        _show(args, one_file)


def _show(args: argparse.Namespace, one_file: bool) -> None:
    from foveate.cli.models import open_models
    from foveate.data import ImageFiles

    files = ImageFiles(args.images, strict=args.strict)
    heat = args.kind == "heat"
    models = open_models(args.model, [] if heat else args.methods, untrained=args.untrained)
    _check(args, models)
    pictures = _sheet(args, models, files) if args.kind == "sheet" else _each(args, models, files)
    if one_file:
        from foveate.viz import stacked

        _write(stacked([picture for _, picture in pictures]), args.out)
    else:
        for name, picture in pictures:
            _write(picture, args.out / f"{name}.png")


def _check(args: argparse.Namespace, models: list[Any]) -> None:
    """Refuse pictures that cannot be drawn of these models."""
    from foveate.core import ReducedViT
    from foveate.dense import Hosting

    dense = any(isinstance(model, Hosting) for model in models)
    if args.kind == "heat":
        if dense:
            raise ValueError(f"--kind heat is of ViTs, and {args.model} is built around one")
        return
    if dense and args.fit != "stretch":
        raise ValueError(f"--fit is for ViTs: {args.model} takes images of any size whole")
    if not all(
        isinstance(model, ReducedViT | Hosting) and model.reducer.name != "dense"
        for model in models
    ):
        raise ValueError(
            f'{args.model} has no method: name one, such as "evit(keep=0.7)", or ask for '
            "--kind heat"
        )


def _preprocessing(args: argparse.Namespace, model: Any) -> Any:
    """Return how images are brought to a ViT's size; None for models that take any size."""
    from foveate.data import Preprocessing
    from foveate.dense import Hosting

    return None if isinstance(model, Hosting) else Preprocessing.of(model, fit=args.fit)


def _sheet(
    args: argparse.Namespace, models: list[Any], files: ImageFiles
) -> Iterator[tuple[str, Image]]:
    from foveate import viz

    yield "sheet", viz.sheet(models, files, preprocessing=_preprocessing(args, models[0]))


def _each(
    args: argparse.Namespace, models: list[Any], files: ImageFiles
) -> Iterator[tuple[str, Image]]:
    """Draw one picture for each image and model, with a name for its file."""
    from foveate import viz
    from foveate.files import FreeNames

    preprocessing, names = _preprocessing(args, models[0]), FreeNames()
    for path, image in files:
        for model in models:
            if args.kind == "heat":
                words = "heat"
                picture = viz.heat(
                    model, image, args.how, target=args.target, preprocessing=preprocessing
                )
            else:
                words = f"{model.reducer!r}-{args.kind}"
                picture = viz.draw(model, image, args.kind, preprocessing=preprocessing)
            stem = f"{path.stem}-{re.sub(r'[^A-Za-z0-9.=+-]+', '_', words)}"
            yield names.free(stem), picture


def _write(picture: Image, path: Path) -> None:
    from PIL import Image as Library

    from foveate.files import write_whole

    kind = Library.registered_extensions()[path.suffix.lower()]
    write_whole(path, lambda partial: picture.save(partial, format=kind))
    print(f"wrote    {path} ({picture.width} x {picture.height} pixels)")
