"""Heat maps against textbook versions that hook into timm's own, un-fused attention."""

from __future__ import annotations

import copy

import pytest
import torch
from contract.table import FORMS, form
from pictures import photo
from small import close, images
from torch import Tensor, nn

from foveate import viz

SIZES = ((48, 48), (32, 72))


def naive(model: nn.Module, x: Tensor, target: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Attention maps and their gradients from a stock timm model."""
    model = copy.deepcopy(model)
    maps: list[Tensor] = []

    def note(_: nn.Module, __: object, out: Tensor) -> None:
        out.retain_grad()
        maps.append(out)

    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(note)
    logits = model(x)
    chosen = logits.argmax(1) if target is None else torch.full((len(x),), target)
    logits.gather(1, chosen[:, None]).sum().backward()
    return maps, [a.grad for a in maps]


def naive_rows(model: nn.Module, x: Tensor, how: str, target: int | None) -> Tensor:
    """The whole matrix of one image after another, ``[B, N, N]``."""
    maps, grads = naive(model, x, target)
    every = []
    for b in range(len(x)):
        eye = torch.eye(maps[0].shape[-1])
        total = eye
        for a, g in zip(maps, grads, strict=True):
            if how == "rollout":
                step = a[b].mean(0) + eye
                total = (step / step.sum(-1, keepdim=True)) @ total
            else:
                total = total + (a[b] * g[b]).clamp(min=0).mean(0) @ total
        every.append(total)
    return torch.stack(every)


@pytest.mark.parametrize("target", [None, 3])
@pytest.mark.parametrize("how", ["rollout", "relevance"])
def test_class_token_row_equals_the_textbook(how: str, target: int | None) -> None:
    model, x = form("vit"), images(2)
    expected = naive_rows(model, x, how, target)[:, 0, 1:]
    found = viz.heat_map(model, x, how, target=target)
    assert found.shape == (2, 6, 6)
    close(found.flatten(1), expected)


@pytest.mark.parametrize("how", ["rollout", "relevance"])
def test_without_class_token_the_rows_of_all_patches(how: str) -> None:
    model, x = form("siglip_average"), images(2)
    expected = naive_rows(model, x, how, None)
    if how == "relevance":
        expected = expected - torch.eye(36)
    close(viz.heat_map(model, x, how).flatten(1), expected.mean(1))


def test_a_head_that_reads_patches_has_their_rows() -> None:
    model, x = form("vit_average"), images(1)
    expected = naive_rows(model, x, "relevance", None) - torch.eye(37)
    close(viz.heat_map(model, x).flatten(1), expected[:, 1:, 1:].mean(1))


@pytest.mark.parametrize("block", [0, 2, -1])
def test_class_attention_is_a_row_of_one_block(block: int) -> None:
    x = images(2)
    maps, _ = naive(form("vit"), x, None)
    expected = maps[block].mean(1)[:, 0, 1:]
    close(viz.heat_map(form("vit"), x, "attention", block=block).flatten(1), expected)
    maps, _ = naive(form("siglip_average"), x, None)
    found = viz.heat_map(form("siglip_average"), x, "attention", block=block)
    close(found.flatten(1), maps[block].mean((1, 2)))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_and_size(name: str) -> None:
    model = form(name)
    one_size = name.startswith("hf_") or name == "multiscale"  # which halves its grid
    for size in SIZES[:1] if one_size else SIZES:
        for how in viz.HEATS:
            if how == "relevance" and name in ("dinov2", "hf_siglip"):
                continue
            found = viz.heat_map(model, images(2, size), how)
            assert found.shape == (2, size[0] // 8, size[1] // 8)
            assert torch.isfinite(found).all() and (found >= 0).all() and found.std() > 0
            assert not found.requires_grad


def test_the_model_is_left_as_it_was() -> None:
    import foveate

    model = copy.deepcopy(form("vit")).train()
    model.blocks[1].eval()
    for p in model.parameters():
        p.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    expected = viz.heat_map(form("vit"), images(1))
    with torch.inference_mode():
        found = viz.heat_map(model, images(1))
    close(found, expected)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    reduced = foveate.apply(form("vit"), "evit", keep=0.5)
    close(viz.heat_map(reduced, images(1)), expected)  # of the base model


def test_what_cannot_be_explained_is_refused() -> None:
    for model, options, message in (
        (form("dinov2"), {}, "has no head"),
        (form("vit"), {"target": 10}, r"target must lie in 0\.\.9"),
        (form("vit"), {"block": 4}, r"block must lie in -4\.\.3"),
        (form("vit"), {"how": "grad-cam"}, "how must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            viz.heat_map(model, images(1), **options)


def test_pictures_of_heat() -> None:
    every = viz.heat(form("vit"), photo())
    assert every.width > viz.heat(form("vit"), photo(), "rollout").width
    assert viz.heat(form("dinov2"), photo()).width < every.width
