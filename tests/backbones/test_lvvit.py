"""LV-ViT: a model of our own, native and driven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import close, images, logits, randomise, vit
from torch import Tensor

import foveate
from foveate.backbones import LVViT, lvvit_m, lvvit_s


def lvvit(**options: object) -> LVViT:
    model = randomise(vit(LVViT, **options)).eval()
    for norm in (model.patch_embed.bn1, model.patch_embed.bn2, model.patch_embed.bn3):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model


def textbook(model: LVViT, x: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits and patch logits as methods.md 20 has them, block by block."""
    stem = model.patch_embed
    for conv, norm in ((stem.conv1, stem.bn1), (stem.conv2, stem.bn2), (stem.conv3, stem.bn3)):
        x = torch.relu(norm(conv(x)))
    x = stem.proj(x).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    for block in model.blocks:
        y = block.norm1(x)
        q, k, v = (
            part.unflatten(-1, (3, -1)).transpose(1, 2) for part in block.attn.qkv(y).chunk(3, -1)
        )
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2)) / 2
        x = x + block.mlp(block.norm2(x)) / 2
    x = model.norm(x)
    return model.head(x[:, 0]), model.aux_head(x[:, 1:])


@torch.no_grad()
def test_native_is_the_textbook() -> None:
    model = lvvit()
    token, patches = textbook(model, images())
    got = model.forward_labels(images())
    close(got[0], token)
    close(got[1], patches)
    close(model(images()), token + 0.5 * patches.amax(1))
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-5
    assert model.blocks[0].attn.qkv.bias is None
    assert model.blocks[0].mlp.fc1.out_features == 3 * 48


def test_the_sizes_of_the_papers() -> None:
    with torch.device("meta"):
        small, middle = lvvit_s(), lvvit_m(num_classes=10, img_size=384)
    assert (small.embed_dim, len(small.blocks), small.blocks[0].attn.num_heads) == (384, 16, 6)
    assert (middle.embed_dim, len(middle.blocks), middle.blocks[0].attn.num_heads) == (512, 20, 8)
    assert foveate.apply(small, "dynamicvit").reducer.active_blocks == (4, 8, 12)
    assert foveate.apply(middle, "dynamicvit").reducer.active_blocks == (5, 10, 15)
    assert middle.aux_head.out_features == 10 and middle.pos_embed.shape[1] == 577


@pytest.mark.parametrize("mode", ["gathered", "packed", "masked"])
def test_the_auxiliary_maximum_is_over_what_is_left(mode: str) -> None:
    model = foveate.apply(lvvit(), "dynamicvit(keep=0.6)").eval()
    randomise(model.reducer, seed=1)
    model.mode = mode
    trace = model.trace(images())
    state, vit_ = trace.final, foveate.unwrap(model)
    expected = []
    for b in range(3):
        tokens = state.tokens()[b]
        live = torch.ones(len(tokens), dtype=torch.bool)
        if state.alive is not None:
            live = state.alive[b] > 0
        patches = tokens[1:][live[1:]]
        expected.append(vit_.head(tokens[0]) + 0.5 * vit_.aux_head(patches).amax(0))
    close(trace.logits, torch.stack(expected).detach())


def test_fused_tokens_have_no_label() -> None:
    model = foveate.apply(lvvit(), "evit(keep=0.5, blocks=[3])").eval()
    trace = model.trace(images())
    vit_, tokens = foveate.unwrap(model), trace.final.tokens()
    expected = vit_.head(tokens[:, 0]) + 0.5 * vit_.aux_head(tokens[:, 1:-1]).amax(1)
    close(trace.logits, expected.detach())


def test_another_size_another_head() -> None:
    model = lvvit()
    driven = foveate.apply(model, "random(keep=1.0)").eval()
    wide = images(2, (64, 40))
    at_size = logits(driven, wide)
    model.set_input_size(img_size=(64, 40))
    close(model(wide).detach(), at_size, 1e-4)
    close(logits(driven, wide), at_size, 1e-4)
    with pytest.raises(ValueError, match="takes images of 64 x 40, got 48 x 48"):
        model(images())
    model.reset_classifier(3)
    assert model(wide).shape == logits(driven, wide).shape == (2, 3)
    close(logits(driven, wide), model(wide).detach())
    model.reset_classifier(0)
    assert model(wide).shape == logits(driven, wide).shape == (2, 48)
    close(logits(driven, wide), model(wide).detach())


def test_everything_is_saved(tmp_path: Path) -> None:
    model = foveate.apply(lvvit(), "dynamicvit(keep=0.6)").eval()
    randomise(model.reducer, seed=1)
    foveate.save(model, tmp_path, everything=True)
    again = foveate.load(tmp_path).eval()
    assert type(foveate.unwrap(again)) is LVViT
    assert torch.equal(logits(again, images()), logits(model, images()))


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="patch_size must be even"):
        LVViT(patch_size=7)
    with pytest.raises(ValueError, match="reads its class token"):
        lvvit().reset_classifier(3, global_pool="avg")
    with pytest.raises(ValueError, match="a class of its own"):
        foveate.apply(vit(type("Other", (LVViT,), {"forward_head": None})), "evit")
