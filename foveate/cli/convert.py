"""Convert a checkpoint that authors released into a folder or file that foveate opens.

The origin is inferred from the checkpoint's keys; EViT's must be given. A model with a method
becomes a folder that foveate.load reads without a model; one without a method becomes a
.safetensors file with timm's keys. With --pretraining the decoder, head or projector of MAE,
SimMIM, BootMAE or ConMIM is kept too, in OUT.pretrain.safetensors, so that pre-training can go on.
No code in the checkpoint is run.

In a terminal:
  foveate convert dynamic-vit_384_r0.7.pth dynamicvit/ keep=0.7
  foveate convert evit-0.7-img224-deit-s.pth evit/ --origin evit keep=0.7
  foveate convert deit_small_patch16_224.pth tome/ --method "tome(r=13)"
  foveate convert dinov2-base/ evit/ --image-size 224 --method "evit(keep=0.7)"
  foveate convert mae_pretrain_vit_base.pth mae.safetensors
  foveate convert mae_pretrain_vit_base_full.pth mae.safetensors --pretraining
  foveate convert mae_visualize_vit_large.pth mae.safetensors --pretraining norm_pix=false
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.convert import Settings
    from foveate.core import BackboneSpec

__all__ = ["add_arguments", "image_size", "run"]

_WORDS = {"true": True, "false": False, "none": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help=".pth, .pt or .safetensors file, or a Hugging Face folder",
    )
    add(
        "out",
        type=Path,
        metavar="OUT",
        help="folder for a model with a method, or .safetensors file for one without",
    )
    add("options", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the method")
    add(
        "--pretraining",
        action="store_true",
        help="keep the decoder, head or projector of MAE, SimMIM, BootMAE or ConMIM; options are "
        "then the method's, such as norm_pix and decoder_heads",
    )
    add(
        "--origin",
        help="vit, mae, simmim, bootmae, conmim, beit, lvvit, dynamicvit, evit, evovit or svit "
        "(default: inferred)",
    )
    add("--method", help='method for a plain model, such as "tome(r=13)"')
    add(
        "--num-heads",
        type=int,
        metavar="N",
        help="number of attention heads (default: the model's width / 64)",
    )
    add(
        "--image-size",
        type=image_size,
        metavar="N or HxW",
        help="image size to convert to; positions are resized (default: the checkpoint's size)",
    )
    add(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="resize positions with or without antialiasing (default: as timm does it for files, "
        "as transformers does it for Hugging Face folders)",
    )
    add(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="weights to take from a file with an EMA copy (default: the model's)",
    )


def run(args: argparse.Namespace) -> None:
    """Convert and print what was recognised."""
    options = dict(_option(text) for text in args.options)
    if not args.checkpoint.exists():  # checked before seconds of imports
        raise ValueError(f"{args.checkpoint} does not exist; expected a checkpoint or a folder")

    from foveate.backbones import backbone_of
    from foveate.convert import Settings, open_model, save, save_plain
    from foveate.core import ReducedViT

    settings = Settings(
        origin=args.origin,
        num_heads=args.num_heads,
        image_size=args.image_size,
        antialias=args.antialias,
        weights=args.weights,
    )
    if args.pretraining:
        if args.method is not None:
            raise ValueError("--pretraining and --method do not go together")
        _convert_pretraining(args, settings, options)
        return
    loaded = open_model(args.checkpoint, None, args.method, options, settings)
    model = loaded.model
    reduced = isinstance(model, ReducedViT)
    if loaded.origin == "hugging face" and not reduced:
        raise ValueError(
            f"foveate.load reads {args.checkpoint} without conversion; give a --method"
        )
    _check_out(args.checkpoint, args.out, folder=reduced)
    spec = backbone_of(model).spec
    print(f"origin   {loaded.origin}")
    print(f"model    {_form(spec)}, {spec.classes} classes")
    if isinstance(model, ReducedViT):
        print(f"method   {model.reducer!r}")
    for note in loaded.notes:
        print(f"note     {note}")
    if isinstance(model, ReducedViT):
        save(model, args.out, everything=True)
    else:
        save_plain(model, args.out)
    print(f"wrote    {args.out}")


def _convert_pretraining(
    args: argparse.Namespace, settings: Settings, options: dict[str, Any]
) -> None:
    """Write both files of a pre-trained model."""
    from foveate.mim.release import open_release
    from foveate.mim.weights import rest_path, save_model

    _check_out(args.checkpoint, args.out, folder=False)
    model = open_release(args.checkpoint, settings, options)
    assert model.options is not None
    said = ", ".join(f"{name}={value}" for name, value in model.options.items())
    print(f"origin   {model.name}")
    print(f"model    {_form(model.backbone.spec)}")
    print(f"method   {model.name}({said})")
    save_model(model, args.out)
    print(f"wrote    {args.out}")
    print(f"wrote    {rest_path(args.out)}")


def _form(spec: BackboneSpec) -> str:
    return (
        f"{spec.family}, width {spec.width}, depth {spec.depth}, {spec.heads} heads, "
        f"patch {spec.patch[0]} x {spec.patch[1]}, grid {spec.grid[0]} x {spec.grid[1]}"
    )


def image_size(text: str) -> tuple[int, int]:
    """Parse height and width from "384" or "224x384"."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"expected pixels, such as 384 or 224x384 (height x width), got {text!r}"
        )
    return int(match[1]), int(match[2] or match[1])


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"options of the method go as OPTION=VALUE, got {text!r}")
    if value.lower() in _WORDS:
        return name, _WORDS[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as deit


def _check_out(checkpoint: Path, out: Path, *, folder: bool) -> None:
    """Refuse a target of the wrong kind before anything is written."""
    if folder and (out.suffix == ".safetensors" or out.is_file()):
        raise ValueError(f"{out} must be a folder: the model has a method to save beside weights")
    if not folder and (out.suffix != ".safetensors" or out.is_dir()):
        raise ValueError(f"{out} must end in .safetensors: a model without a method is one file")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise ValueError(f"{out} is the checkpoint itself; give another target")
