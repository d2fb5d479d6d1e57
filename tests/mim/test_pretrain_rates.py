"""Warm-up as a share of the run, and rates that fall in steps, against the closed form."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import pytest
import torch
from masked_models import method, recipe, run
from torch import nn

from foveate.mim import Hiding
from foveate.mim.task import PretrainTask
from foveate.train.logs import read_metrics
from foveate.train.optim import Rates, parameter_groups
from foveate.train.recipe import Optim


def closed(update: int, peak: float, first: float, warmup: int, milestones: list[int]) -> float:
    """Linear from the first rate; then a tenth from the update on that a milestone names."""
    if update < warmup:
        return first + (peak - first) * update / warmup
    return peak * 0.1 ** bisect_right(sorted(milestones), update)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("milestones", [[20], [12, 25], [28, 9], [29]])
def test_steps_are_the_closed_form(warmup: int, milestones: list[int]) -> None:
    """Milestones count from the start of the run, with a warm-up as without one."""
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "lr_scale": scale, "new": new}
        for scale, new in ((0.25, False), (1.0, True))
    ]
    optimiser = torch.optim.SGD(groups, lr=0.5)
    rates = Rates(
        optimiser, (0.5, 0.0, 0.002), updates=30, warmup=warmup, frozen=4, milestones=milestones
    )
    for update in (*range(30), 3, 29, 0):  # in any order: a resumed run starts in the middle
        wanted = closed(update, 0.5, 0.002, warmup, milestones)
        assert rates.set(update) == pytest.approx(wanted)
        backbone, new = (group["lr"] for group in optimiser.param_groups)
        assert new == pytest.approx(wanted)
        assert backbone == pytest.approx(0 if update < 4 else 0.25 * wanted)


def logged(out: Path) -> list[float]:
    return [float(row["rate"]) for row in read_metrics(out / "metrics.csv") if "rate" in row]


def test_shares_of_a_run(tmp_path: Path) -> None:
    """Of 8 updates: 2 of warm-up, steps at 4 and 6; rates as images make an update."""
    settings = ("optim.lr=0.008", "optim.lr_batch=32", "optim.warmup_lr=0.002")
    steps = ("optim.schedule=steps", "optim.milestones=[0.5,0.75]")
    run(recipe(*settings, *steps, "optim.warmup_share=0.25"), tmp_path / "steps")
    wanted = [closed(k, 0.004, 0.001, 2, [4, 6]) for k in range(8)]
    assert logged(tmp_path / "steps") == pytest.approx(wanted, rel=1e-5)
    assert wanted == pytest.approx([0.001, 0.0025, 0.004, 0.004, 0.0004, 0.0004, 4e-5, 4e-5])


def test_a_share_is_as_many_epochs(tmp_path: Path) -> None:
    run(recipe("optim.warmup_share=0.25", "optim.lr=0.01"), tmp_path / "share")
    run(recipe("optim.warmup_epochs=0.5", "optim.lr=0.01"), tmp_path / "epochs")
    rates = logged(tmp_path / "share")
    assert rates == logged(tmp_path / "epochs") and rates[:3] == [0, 0.005, 0.01]


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_weight_decay_of_what_is_pretrained(name: str) -> None:
    """None for mask tokens, positions, norms and biases; what a method added learns as fast."""
    task = PretrainTask(method(name), Hiding(kind="random"))
    named = {id(p): key for key, p in task.model.named_parameters()}
    found = {}
    for group in parameter_groups(task, Optim(weight_decay=0.3)):
        assert group["lr_scale"] == 1
        found |= {named[id(p)]: group["weight_decay"] for p in group["params"]}
    trained = {key for key, p in task.model.named_parameters() if p.requires_grad}
    assert found.keys() == trained and ("vit.pos_embed" in found) == (name == "simmim")
    for key, decay in found.items():
        plain = key.endswith(("bias", "token", "pos_embed")) or "norm" in key
        assert decay == (0 if plain else 0.3), key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"warmup_share": 0.1, "warmup_epochs": 1},
            "^optim.warmup_epochs and optim.warmup_share s",
        ),
        ({"warmup_share": 1.5}, r"^optim.warmup_share must lie in \[0, 1\], got 1.5$"),
        ({"schedule": "steps"}, "^optim.schedule=steps and optim.milestones go together$"),
        ({"milestones": (0.5,)}, "^optim.schedule=steps and optim.milestones go together$"),
        ({"schedule": "steps", "milestones": (1.2,)}, "^optim.milestones must lie in"),
        ({"schedule": "step"}, "optim.schedule"),
    ],
)
def test_choices_that_cannot_be(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Optim(**changes)
