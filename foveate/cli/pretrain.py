"""Pre-train a ViT on images without labels, by masked image modelling.

The methods are MAE, SimMIM, BootMAE and ConMIM, each with or without masked token optimisation
(MTO), which adds losses on the tokens. The result is a plain timm checkpoint, from which
fine-tuning starts. foveate look and foveate rauc read the run's snapshots and progress curve.

In a terminal:
  foveate pretrain --list
  foveate pretrain fashion_part_mae
  foveate pretrain fashion_part_simmim mto.preset=default --out runs/simmim-mto
  foveate pretrain fashion_part_conmim options.momentum=0.98
  foveate pretrain folder_mae data.train=folder:photos model.name=vit_small_patch16_224
  foveate pretrain --resume runs/pretrain-fashion_part_mae
  foveate finetune fashion_part_full model.start=runs/pretrain-fashion_part_mae
"""

from __future__ import annotations

import argparse

from foveate.cli.training import add_recipe_arguments, begin

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_recipe_arguments(parser, "pretrain", resumable=True)


def run(args: argparse.Namespace) -> None:
    """Pre-train, and say what came of it."""
    begun = begin("pretrain", args)
    if begun is None:
        return
    recipe, out = begun
    from foveate.mim.run import pretrain

    result = pretrain(recipe, out, resume=args.resume, say=print)
    if "model" not in result:  # not the first of several processes
        return
    scores = [f"loss {result['loss']:.4f}"] if "loss" in result else []
    words = {"probe/knn": "nearest neighbours", "probe/linear": "linear probe"}
    scores += [f"{words[name]} {result[name]:.2f} %" for name in words if name in result]
    said = f"{', '.join(scores)}; " if scores else ""
    print(f"{said}the backbone is {out / result['model']}")
