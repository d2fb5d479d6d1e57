"""Learning rates and parameter groups against the closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from contract.table import form
from runs import finetune, reduce, run, small_model
from torch import nn

import foveate
from foveate.train.finetune import FinetuneTask
from foveate.train.logs import read_metrics
from foveate.train.optim import (
    Rates,
    fix_parameters,
    make_optimiser,
    parameter_groups,
    scaled,
    updates_of,
)
from foveate.train.recipe import Optim
from foveate.train.reduce import ReduceTask
from foveate.train.task import Task


def closed(update: int, peak: float, last: float, first: float, warmup: int, updates: int) -> float:
    """Linear from the first rate, then half a cosine that begins where the warm-up ends."""
    if update < warmup:
        return first + (peak - first) * update / warmup
    done = (update - warmup) / (updates - warmup)
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize("warmup", [0, 7, 30])
def test_rates_are_the_closed_form(warmup: int) -> None:
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "lr_scale": scale, "new": new}
        for scale, new in ((0.25, False), (1.0, True))
    ]
    optimiser = torch.optim.SGD(groups, lr=0.5)
    rates = Rates(optimiser, (0.5, 0.01, 0.002), updates=30, warmup=warmup, frozen=4)
    for update in (*range(30), 3, 29, 0):  # in any order: a resumed run starts in the middle
        wanted = closed(update, 0.5, 0.01, 0.002, warmup, 30)
        assert rates.set(update) == pytest.approx(wanted)
        backbone, new = (group["lr"] for group in optimiser.param_groups)
        assert new == pytest.approx(wanted)
        assert backbone == pytest.approx(0 if update < 4 else 0.25 * wanted)


def test_rates_of_a_run(tmp_path: Path) -> None:
    """Update by update in the log, scaled by the images that make one; accumulation counts."""
    recipe = finetune(
        *("data.batch=8", "loop.accumulate=2", "loop.epochs=3", "optim.warmup_epochs=1.5"),
        *("optim.lr=0.01", "optim.lr_batch=64", "optim.min_lr=0.004", "optim.warmup_lr=0.002"),
    )
    run(recipe, tmp_path)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "rate" in row]
    share = 16 / 64
    wanted = [closed(k, 0.01 * share, 0.004 * share, 0.002 * share, 6, 12) for k in range(12)]
    assert [float(row["rate"]) for row in rows] == pytest.approx(wanted, rel=1e-5)
    assert [int(row["step"]) for row in rows] == list(range(12))


def test_scaling_is_linear_in_the_images() -> None:
    optim = Optim(lr=1e-3, lr_batch=256, min_lr=1e-6, warmup_lr=1e-5)
    assert scaled(optim, 1024) == pytest.approx((4e-3, 4e-6, 4e-5))
    assert scaled(Optim(lr=1e-3), 1024) == (1e-3, 0, 0)


def test_updates_of_an_epoch_with_a_short_last_one() -> None:
    assert updates_of(1, 10, 4) == 3 and updates_of(5, 10, 1) == 50
    assert updates_of(0.5, 10, 1) == 5 and updates_of(0, 10, 1) == 0


def test_a_frozen_backbone_stays_and_then_moves(tmp_path: Path) -> None:
    start = small_model()
    lengths = []
    for epochs in (1, 2):
        recipe = reduce(
            "dynamicvit", "weights.kl=0", "weights.token=0", "optim.frozen_epochs=1", "loop.seed=7"
        )
        recipe.loop.max_steps = 4 * epochs
        out = tmp_path / str(epochs)
        run(recipe, out)
        trained = foveate.load(out / "model")
        pairs = zip(trained.vit.parameters(), start.parameters(), strict=True)
        lengths.append(sum(float((a - b).detach().abs().sum()) for a, b in pairs))
        again = foveate.apply(small_model(), "dynamicvit", check=False)
        gates = zip(trained.reducer.parameters(), again.reducer.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in gates)
    assert lengths[0] == 0 < lengths[1]


# Groups ------------------------------------------------------------------------------------------


def plain(**options: Any) -> Task:
    model = small_model(**options)
    return FinetuneTask(model, model.num_classes)


def names_of(task: Task) -> dict[int, str]:
    return {id(p): name for name, p in task.model.named_parameters()}


def groups_of(task: Task, optim: Optim) -> list[dict[str, Any]]:
    fix_parameters(task, optim)
    return parameter_groups(task, optim)


def by_name(task: Task, optim: Optim) -> dict[str, dict[str, Any]]:
    """Each parameter's group; every trainable one is in exactly one."""
    names, found = names_of(task), {}
    for group in groups_of(task, optim):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group
    trainable = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert found.keys() == trainable
    return found


def test_layer_decay_of_a_vit_of_twelve_blocks() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, num_classes=10)
    optim = Optim(layer_decay=0.65, weight_decay=0.3, lr=2.0)
    task = FinetuneTask(model, 10)
    found = by_name(task, optim)
    wanted = {f"blocks.{block}.mlp.fc1.weight": 0.65 ** (12 - block) for block in range(12)}
    wanted |= {"pos_embed": 0.65**13, "cls_token": 0.65**13, "patch_embed.proj.weight": 0.65**13}
    # timm puts the last norm with the last block.
    wanted |= {"head.weight": 1.0, "head.bias": 1.0, "norm.weight": 0.65}
    for name, scale in wanted.items():
        assert found[name]["lr_scale"] == pytest.approx(scale), name
    assert len({group["lr_scale"] for group in found.values()}) == 14
    optimiser = make_optimiser(FinetuneTask(model, 10), optim, 2.0)
    Rates(optimiser, (2.0, 0.0, 0.0), updates=10).set(0)
    rates = sorted({group["lr"] for group in optimiser.param_groups})
    assert rates == pytest.approx([2.0 * 0.65**power for power in range(13, -1, -1)])


UNDECAYED = ("bias", "norm", "pos_embed", "cls_token", "reg_token", "gamma", "position_embeddings")
UNDECAYED += ("register_tokens", "mask_token", "class_embedding", "position_embedding")


@pytest.mark.parametrize("decay", [1.0, 0.8])
@pytest.mark.parametrize("name", ["vit", "deit3", "dinov2_reg4", "dinov3", "lvvit"])
def test_weight_decay_of_timm_models(name: str, decay: float) -> None:
    task = FinetuneTask(form(name), 10)
    _check_decay(by_name(task, Optim(weight_decay=0.3, layer_decay=decay)), task)


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2_reg4", "hf_siglip"])
def test_weight_decay_of_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    task = FinetuneTask(form(name), 10)
    _check_decay(by_name(task, Optim(weight_decay=0.3)), task)
    with pytest.raises(ValueError, match="optim.layer_decay=0.8 needs a model of timm, which says"):
        parameter_groups(task, Optim(layer_decay=0.8))


def _check_decay(found: dict[str, dict[str, Any]], task: Task) -> None:
    parameters = dict(task.model.named_parameters())
    for name, group in found.items():
        without = parameters[name].ndim <= 1 or any(word in name for word in UNDECAYED)
        without &= "position_embedding" not in name or "patch" not in name
        assert group["weight_decay"] == (0.0 if without else 0.3), name
    assert any(group["weight_decay"] for group in found.values())


def test_what_a_method_adds_trains_at_the_full_rate() -> None:
    for decay in (1.0, 0.75):
        model = foveate.apply(small_model(), "dynamicvit", check=False)
        task = ReduceTask(model, 10, weights={"kl": 0, "token": 0})
        found = by_name(task, Optim(backbone_scale=0.01, layer_decay=decay, weight_decay=0.3))
        for name, group in found.items():
            new = name.startswith("reducer.")
            assert group["new"] == new
            assert group["lr_scale"] == 1.0 if new else group["lr_scale"] <= 0.01, name
        assert found["reducer.predictors.0.out.1.weight"]["weight_decay"] == 0.3
        assert found["reducer.predictors.0.out.1.bias"]["weight_decay"] == 0


def test_fixed_parameters_are_in_no_group() -> None:
    task = plain()
    found = by_name(task, Optim(fixed=("pos_embed", "blocks.0.attn.qkv.weight")))
    assert "pos_embed" not in found and "blocks.0.attn.qkv.weight" not in found
    assert "blocks.1.attn.qkv.weight" in found and not task.model.pos_embed.requires_grad
    with pytest.raises(ValueError, match="optim.fixed names embed, which no parameter"):
        groups_of(plain(), Optim(fixed=("embed",)))
    every = tuple(dict(small_model().named_parameters()))
    with pytest.raises(ValueError, match="optim.fixed leaves nothing to train"):
        groups_of(plain(), Optim(fixed=every))


def test_an_unknown_optimiser() -> None:
    with pytest.raises(ValueError, match="optim.name=adamv is not an optimiser of timm; did you"):
        Optim(name="adamv")
    assert make_optimiser(plain(), Optim(name="lookahead_adamw"), 0.1) is not None
