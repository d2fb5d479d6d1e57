"""An artificial class token for methods that read class attention."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import timm
import torch
from small import images, randomise, vit
from torch import nn

import foveate
from foveate.dense import adapter, make_dense, pyramid, with_class_token


def without(**changes: object) -> nn.Module:
    return randomise(vit(class_token=False, global_pool="avg", **changes)).eval()


@pytest.mark.parametrize("registers", [0, 2])
def test_all_else_stays(registers: int, caplog: pytest.LogCaptureFixture) -> None:
    plain = without(reg_tokens=registers, no_embed_class=registers > 0)
    with caplog.at_level(logging.WARNING):
        made = with_class_token(plain)
    assert "says nothing about an image until it is trained" in caplog.text
    state = made.state_dict()
    assert state.pop("cls_token").shape == (1, 1, 48)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in state.items())
    assert not made.training and with_class_token(made) is made
    # Patches differ only by what they read of the token: nothing if its keys are out of reach.
    with torch.no_grad():
        one, two = plain.patch_embed(images()), made.patch_embed(images())
    assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["evit(keep=0.5)", "ats", "evovit(keep=0.5)"])
@pytest.mark.parametrize("make", [adapter, pyramid])
def test_methods_read_its_attention_and_it_learns(
    make: object, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    reduced = foveate.apply(with_class_token(without()), method)
    assert "attention each token receives" not in caplog.text
    assert make in (adapter, pyramid)
    backbone = (adapter if make is adapter else pyramid)(reduced)
    backbone.train()
    torch.manual_seed(0)
    maps = backbone(torch.randn(2, 3, 64, 96))
    sum((values * torch.randn_like(values)).sum() for values in maps.values()).backward()
    token = backbone.body.vit.cls_token
    assert token.grad is not None and token.grad.abs().max() > 0


def test_it_is_saved_with_its_model(tmp_path: Path) -> None:
    vit = foveate.apply(with_class_token(without()), "evit(keep=0.5)")
    parts = {"name": "pyramid", "scales": [1, 0.5], "channels": 16}, {"name": "fpn", "channels": 16}
    model = make_dense(vit, ["a", "b"], *parts, None).eval()
    foveate.save(model, tmp_path / "model")
    again = foveate.load(tmp_path / "model")
    several = [torch.rand(3, 40, 64), torch.rand(3, 48, 48)]
    with torch.no_grad():
        for one, two in zip(model.scores(several), again.scores(several), strict=True):
            torch.testing.assert_close(one, two)
    assert again.reduced.backbone.spec.class_token


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="add the class token to the plain ViT first"):
        with_class_token(foveate.apply(without(), "tome(r=2)"))
    with pytest.raises(ValueError, match="only be added to timm's VisionTransformer, got a"):
        with_class_token(
            timm.models.Eva(
                img_size=32,
                embed_dim=48,
                depth=2,
                num_heads=3,
                class_token=False,
                global_pool="avg",
            )
        )
    with pytest.raises(ValueError, match="registers of this ViT have positions"):
        with_class_token(without(reg_tokens=2))
