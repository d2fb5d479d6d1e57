"""Measure what a step of pre-training costs: each method against SimMIM, and what MTO adds.

    python benchmarks/pretrain_speed.py                              # ViT-B, 224 px, this CPU, fp32
    python benchmarks/pretrain_speed.py --dtypes bf16 --batches 8
    python benchmarks/pretrain_speed.py --batches 32 --share    # no whole steps with MTO
    python benchmarks/pretrain_speed.py --device cuda --batches 8 32 --out speed.json

A step has the forward pass, losses and backward pass of one batch, including a teacher's forward
pass and update. It leaves out the optimiser, whose cost is the same with and without MTO. All
variants run interleaved in random order; ratios are medians of rounds.

What MTO adds is measured twice: as a whole step with it over one without, whose noise is as large
as what is sought, and as a share, its losses and their gradients alone over a step without. Its
tokens are then leaves that hold a gradient already, as a block's output does in a step.

Goals: an MAE step costs at most 0.60 of a SimMIM step with a decoder of 8 blocks of width 512, and
0.40 with 2 blocks; MTO adds at most 5 % of time and 10 % of memory to each method. The cost of
BootMAE and ConMIM beside SimMIM is printed without a goal.

Memory is the peak of one forward and backward pass, including weights and gradients: on a GPU as
CUDA counts it, on a CPU the tensors that autograd saves for the backward pass.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import timm
import torch
from torch import Tensor

from foveate import machine
from foveate.mim import (
    Hiding,
    Mto,
    Prediction,
    States,
    TaughtModel,
    make_method,
    mto_losses,
)
from foveate.mim.teacher import follow, make_teacher
from foveate.timing import measure
from foveate.train.draws import Draws
from foveate.train.task import total

MTO_IN = ("simmim", "mae 8x512", "bootmae", "conmim")
GOALS = {
    "mae 8x512 / simmim": 0.60,
    "mae 2x512 / simmim": 0.40,
    **{f"{base} + mto / {base}": 1.05 for base in MTO_IN},
    **{f"mto in {base} / {base}": 0.05 for base in MTO_IN},
}
MEMORY_GOAL = 1.10
METHODS = {
    "simmim": ("simmim", {}),
    "mae 8x512": ("mae", {"decoder_depth": 8}),
    "mae 2x512": ("mae", {"decoder_depth": 2}),
    "bootmae": ("bootmae", {}),
    "conmim": ("conmim", {}),
}


def make_steps(
    name: str, options: argparse.Namespace, dtype: str, batch: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """Return calls that run a step without MTO, with MTO, and MTO's losses alone."""
    method, arguments = METHODS[name]
    torch.manual_seed(0)
    with torch.device(options.device):  # weights are drawn fast there
        model = make_method(method, timm.create_model(options.model, num_classes=0), arguments)
        model.initialise()
    model = model.to(options.device).train()
    teacher = None
    if isinstance(model, TaughtModel):
        teacher = make_teacher(model).requires_grad_(False).train(model.teacher_trains)
    spec = model.backbone.spec
    images = torch.randn(batch, 3, *(n * p for n, p in zip(spec.grid, spec.patch, strict=True)))
    images = images.to(options.device)
    hiding = Hiding().filled(model.hiding)
    mask = hiding.draw(batch, spec.grid, spec.patch, Draws(0, 0, 0, device=options.device))

    def predict(mto: Mto | None) -> Prediction:
        taught = {} if teacher is None else {"target": teacher.target(images)}
        return model(images, mask, states=mto is not None, **taught)

    def step(mto: Mto | None) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(options.device, torch.bfloat16, enabled=dtype == "bf16"):
            found = predict(mto)
            losses = dict(found.losses)
            if mto is not None:
                losses |= mto_losses(found.states, mask, mto)
        loss = total(losses, {} if mto is None else mto.weights)
        loss.backward()
        if teacher is not None:
            follow(teacher, model, 0.999)
        return loss.detach()

    mto = Mto()
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=dtype == "bf16"):
        networks = [
            [_leaf(x) for x in (states.initial, *states.tokens)] for states in predict(mto).states
        ]

    def alone() -> Tensor:
        tokens = [[x[:, 1:] for x in network] for network in networks]
        states = [States(layers, initial) for initial, *layers in tokens]
        loss = total(mto_losses(states, mask, mto), mto.weights)
        loss.backward()
        return loss.detach()

    return partial(step, None), partial(step, mto), alone


def _leaf(tokens: Tensor) -> Tensor:
    """Put the tokens behind a prefix token, as in a network, with a gradient to add to."""
    leaf = torch.cat([tokens[:, :1], tokens], 1).requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    return leaf


def peak_or_saved_memory(step: Callable[[], Tensor], device: str) -> float:
    """Return the MiB at the peak of a step on a GPU, or those saved for its gradients on a CPU."""
    if device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(held.values()) / 2**20


def cell(options: argparse.Namespace, dtype: str, batch: int) -> dict:
    """Measure all variants at one data type and batch size."""
    variants = {}
    for name in METHODS:
        steps = make_steps(name, options, dtype, batch)
        variants |= zip((name, f"{name} + mto", f"mto in {name}"), steps, strict=True)
    whole = {f"{name} + mto": variants[f"{name} + mto"] for name in METHODS}
    if options.share:
        variants = {name: step for name, step in variants.items() if name not in whole}
    timings = measure(
        {**variants, "simmim again": variants["simmim"]},
        rounds=options.rounds,
        warmup=1,
        sample_ms=1,
        device=options.device,
    )
    pairs = [(name, "simmim") for name in (*METHODS, "simmim again") if name != "simmim"]
    if not options.share:
        pairs += [(f"{name} + mto", name) for name in METHODS]
    pairs += [(f"mto in {name}", name) for name in METHODS]
    found = {"dtype": dtype, "batch": batch, "ms": {}, "time": {}, "memory": {}}
    found["ms"] = {name: round(timings.ms(name).median, 1) for name in timings.samples}
    print(f"\n{dtype}, batch {batch}")
    for name, base in pairs:
        ratio = timings.ratio(base, name)  # its time over the base's
        key = f"{name} / {base}"
        found["time"][key] = ratio.rounded()
        goal = GOALS.get(key)
        said = (
            ""
            if goal is None
            else f"  goal {goal:.2f}: {'met' if ratio.median <= goal else 'MISSED'}"
        )
        print(f"  {key:32} {ratio}{said}")
    for name in METHODS:
        held = peak_or_saved_memory(variants[name], options.device)
        ratio = peak_or_saved_memory(whole[f"{name} + mto"], options.device) / held
        found["memory"][f"{name} + mto / {name}"] = round(ratio, 4)
        met = "met" if ratio <= MEMORY_GOAL else "MISSED"
        print(f"  memory of {name} + mto: {ratio:.3f} of {held:.0f} MiB  {met}")
    return found


def main() -> None:
    """Measure all cells."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--share", action="store_true", help="leave out whole steps with MTO")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine.tune_malloc(options.device, Path(__file__).name)
    record = {
        "model": options.model,
        "rounds": options.rounds,
        "machine": machine.facts(options.device),
        "commit": machine.commit(),
        "cells": [],
    }
    for dtype, batch in product(options.dtypes, options.batches):
        record["cells"].append(cell(options, dtype, batch))
        if options.out is not None:  # after each cell, in case the run is cut short
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
