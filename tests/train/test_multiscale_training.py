"""Multi-scale ViTs in training: made from a plain start, reduced, exported, opened again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import DATA, LOOP, MODEL, checkpoint, exported, finetune, reduce, run
from timm.layers import DropPath

import foveate
from foveate.backbones import MultiScaleViT, Scales
from foveate.train.build import make_finetune, make_reduce

SHORT = {"data": {**DATA, "limit": 32}, "loop": {**LOOP, "epochs": 1}}


def test_finetuning_from_a_plain_checkpoint_and_on(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "plain.safetensors")
    words = ["model.drop_path=0.1", "optim.layer_decay=0.75", "model.multiscale.shared=blocks"]
    recipe = finetune(*words, model={"start": plain, "multiscale": {"down": "nearest"}}, **SHORT)
    run(recipe, tmp_path / "run")
    again = foveate.load(tmp_path / "run")
    expected = Scales(down="nearest", shared="blocks", early=1, downsampled=0)
    assert type(again) is MultiScaleViT and again.scales == expected
    state = exported(tmp_path / "run")
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    assert not torch.equal(state["low_pos_embed"][:, 1:], torch.zeros(1, 4, 32))
    onwards = {"model": {"start": str(tmp_path / "run")}, **SHORT}
    assert make_finetune(finetune(**onwards), 10).model.scales == expected
    run(reduce("evit(keep=0.5)", "weights={class: 1, kl: 0}", **onwards), tmp_path / "two")
    assert foveate.unwrap(foveate.load(tmp_path / "two")).scales == expected


def test_stochastic_depth_starts_in_the_first_blocks() -> None:
    model = {**MODEL, "options": {**MODEL["options"], "depth": 8}}
    words = ["model.drop_path=0.7", "model.multiscale={}"]
    made = make_finetune(finetune(*words, model=model), 10).model
    assert made.scales == Scales(early=2, downsampled=1)
    rates = [
        block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0
        for block in (*made.early, *made.blocks)
    ]
    assert rates == pytest.approx([0.1 * n for n in range(8)])


def test_bad_settings(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "plain.safetensors")
    start = {"start": plain, "multiscale": {}}
    with pytest.raises(
        ValueError, match=r"model\.multiscale: a multi-scale ViT has no option 'up'"
    ):
        make_finetune(finetune(model={**start, "multiscale": {"up": "cubic"}}), 10)
    with pytest.raises(
        ValueError, match=r"cannot teach, model\.multiscale changes what it answers"
    ):
        make_reduce(reduce("dynamicvit(keep=0.7)", model=start), 10)
    with pytest.raises(ValueError, match="multi-scale ViT models take no keep_mask"):
        make_finetune(finetune("masking.ratios=[0.5]", model=start), 10)
    taught = reduce("dynamicvit(keep=0.7)", model=start, teacher=plain)
    assert make_reduce(taught, 10).teacher is not None
    with pytest.raises(ValueError, match="images of 7 x 7 patches cannot be halved"):
        odd = {**MODEL, "options": {**MODEL["options"], "patch_size": 4}, "multiscale": {}}
        make_finetune(finetune(model=odd), 10)
