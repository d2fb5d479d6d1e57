"""Calibrated gates keep their target shares by arg-max, over the images they were shown."""

from __future__ import annotations

import pytest
import torch
from small import images, noise, randomise, vit

import foveate
from foveate.core.calibration import calibrate

DATA = [images(4, seed=0), images(3, seed=1), [noise(3, 40, 48), noise(3, 24, 64, seed=3)]]


@pytest.mark.parametrize(
    "method",
    [
        "svit(keep=0.7)",
        "svit(keep=0.7, network='predictor')",
        "svit(keep=0.7, reactivate=False, span=1)",
        "svit(keep=0.6, gate_prefix_last=True)",
        "dynamicvit(keep=0.7, gate='argmax')",
    ],
)
@torch.no_grad()
def test_shares_meet_their_targets(method: str) -> None:
    model = foveate.apply(randomise(vit()), method, check=False)
    randomise(model.reducer, seed=1)
    reducer = model.reducer
    shifts = calibrate(model, DATA)
    assert tuple(shifts) == reducer.active_blocks and model.gate == reducer.gate
    model.eval().gate = "argmax"
    kept = {stage: 0.0 for stage in range(len(shifts))}
    total = 0
    for batch in DATA:
        state = model.tokens(batch, track=False)
        original = torch.tensor(state.context.original or [state.patches] * state.batch)
        total += int(original.sum())
        for stage, share in state.notes[f"{reducer.name}.kept_share"].items():
            more = state.prefix - reducer.front(stage, state)
            kept[stage] += float((share * (original + more)).sum())
    for stage, count in kept.items():
        assert abs(count / total - reducer.target(stage)) < 0.02, (stage, count / total)


def test_the_gate_rule_and_the_mode_come_back() -> None:
    model = foveate.apply(vit(), "svit", check=False).train()
    calibrate(model, DATA[:1])
    assert model.training and model.gate is None
    assert "logits" not in vars(model.reducer)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="evit has no gates to calibrate"):
        calibrate(foveate.apply(vit(), "evit", check=False), DATA)
    with pytest.raises(ValueError, match="dynamicvit keeps a fixed number of tokens"):
        calibrate(foveate.apply(vit(), "dynamicvit", check=False), DATA)
    with pytest.raises(ValueError, match="one reduced ViT inside, found 0"):
        calibrate(vit(), DATA)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(foveate.apply(vit(), "svit", check=False), [])
    with pytest.raises(ValueError, match="spvit have no bias of their own"):
        calibrate(foveate.apply(vit(), "spvit", check=False), DATA)
