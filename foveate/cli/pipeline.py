"""Pre-train, fine-tune, reduce and evaluate in one command, with one report at the end.

RECIPE names stages in order, each a job with its recipe and settings. A stage starts from the model
of the stage before it, unless its settings say otherwise. The stages are checked against each other
before the first one begins. Every stage has a run folder in --out. The same command again skips
finished stages and resumes an interrupted one; it refuses a folder that was trained with other
settings.

In a terminal:
  foveate pipeline --list
  foveate pipeline fashion_part
  foveate pipeline fashion_part stages.pretrain.loop.epochs=40 --out runs/longer
  foveate pipeline fashion_part data.train=folder:photos "stages.reduce.method=evit(keep=0.7)"
  torchrun --nproc-per-node 8 -m foveate pipeline imagenet_mae_b data.train=folder:imagenet
"""

from __future__ import annotations

import argparse

from foveate.cli.training import add_recipe_arguments, begin

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_recipe_arguments(parser, "pipeline", resumable=False)


def run(args: argparse.Namespace) -> None:
    """Run what is not finished yet, and show what each stage brought."""
    begun = begin("pipeline", args)
    if begun is None:
        return
    pipeline, out = begun
    from foveate import machine
    from foveate.measure.sheets import sheets, show, terminal
    from foveate.stages import run as run_stages

    found = run_stages(pipeline, out, command=machine.command("foveate"), say=print)
    if found is None:  # not the first of several processes
        return
    results, brought = found
    console = terminal()
    for sheet in (brought, *sheets(results, blocks=False)):
        show(sheet, console)
    last = [stage.label for stage in pipeline.in_order if stage.classifies][-1]
    print(f"next     foveate show {out / last} --images FOLDER --out kept.png")
    print(f"         foveate predict {out / last} --images FOLDER    # its answers")
