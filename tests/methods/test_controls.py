"""The controls: static, random, and class attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import after_attention, images, keep_masks, logits, randomise, vit

import foveate
from foveate.core import ReducedViT


def control(method: str, **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)), method)
    randomise(model.reducer, seed=1)
    return model.eval()


# Static --------------------------------------------------------------------------------------


def test_static_keeps_the_best_positions_of_its_map_in_every_image() -> None:
    model = control("static(keep=0.5)")
    there = torch.ones(36, dtype=torch.bool)
    for stage, block in enumerate(model.trace(images()).blocks[1:]):
        score = model.reducer.maps[stage].flatten().masked_fill(~there, float("-inf"))
        there = torch.zeros(36, dtype=torch.bool)
        there[score.topk((18, 9, 4)[stage]).indices] = True
        assert torch.equal(block.active(), there.expand(3, 36))


@pytest.mark.parametrize("size", [(64, 64), (32, 72)], ids=str)
def test_static_maps_are_resized_to_another_grid(size: tuple[int, int]) -> None:
    model, grid = control("static(keep=0.5, blocks=[1])"), (size[0] // 8, size[1] // 8)
    wanted = F.interpolate(model.reducer.maps[:, None], grid, mode="bicubic", align_corners=False)
    patches = grid[0] * grid[1]
    best = wanted[0, 0].flatten().topk(patches // 2).indices
    active = torch.zeros(patches, dtype=torch.bool)
    active[best] = True
    x = images(2, size)
    for mode in ("gathered", "packed", "masked"):
        model.mode = mode
        assert torch.equal(model.trace(x).blocks[1].active(), active.expand(2, patches))
    assert model.reducer.maps.shape == (1, 6, 6)  # the parameter stays as it was


def test_static_learns_from_the_task() -> None:
    model = control("static(keep=0.5)").train()
    torch.manual_seed(0)
    model(images()).square().sum().backward()
    grad = model.reducer.maps.grad
    assert (grad[0] != 0).all()  # of dropped positions too
    assert (grad[1:].flatten(1) != 0).any(1).all()


# Random --------------------------------------------------------------------------------------


def test_random_repeats_in_evaluation_and_does_not_see_the_batch() -> None:
    model = control("random(keep=0.5)")
    first, second = model.trace(images()), model.trace(images(seed=3))
    kept = first.blocks[3].active()
    assert torch.equal(kept, second.blocks[3].active())  # not of the image
    assert torch.equal(kept, kept[:1].expand(3, -1))  # nor of its place in the batch
    assert torch.equal(model.trace(images(1)).blocks[3].active(), kept[:1])
    model.mode = "packed"
    assert torch.equal(model.trace(images()).blocks[3].active(), kept)


def test_random_seeds_and_stages_draw_different_patches() -> None:
    drawn = [
        control(f"random(keep=0.5, blocks=[{block}], seed={seed})")
        .trace(images(1))
        .blocks[3]
        .active()
        for block, seed in ((1, 0), (1, 1), (2, 0))
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])  # of the stage, not of the block
    first = control("random(keep=0.25, blocks=[1])").trace(images(1)).blocks[3].active()
    second = control("random(keep=0.5, blocks=[1, 2])").trace(images(1)).blocks[3].active()
    assert first.sum() == second.sum() and not torch.equal(first, second)


def test_random_takes_any_seed() -> None:
    for seed in (-1, 2**31, 2**62):
        assert control(f"random(keep=0.5, seed={seed})").trace(images()).counts()[3] == (5,) * 3


def test_random_draws_anew_in_training_for_every_image() -> None:
    model = control("random(keep=0.5, blocks=[1])").train()
    torch.manual_seed(0)
    first, second = (model.trace(images()).blocks[1].active() for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(0)
    assert torch.equal(model.trace(images()).blocks[1].active(), first)
    often = torch.stack([model.trace(images()).blocks[1].active() for _ in range(60)])
    assert (often.float().mean((0, 1)) - 0.5).abs().max() < 0.2  # no patch is preferred


def test_random_respects_a_keep_mask() -> None:
    model, mask = control("random(keep=0.5)"), keep_masks(3, (6, 6))
    left = model.trace(images(), keep_mask=mask).blocks[1].active()
    assert not (left & ~mask.flatten(1)).any()
    assert left.sum(1).tolist() == (mask.sum((1, 2)) // 2).tolist()


# Attention -----------------------------------------------------------------------------------


def test_attention_keeps_what_the_class_token_attends_to() -> None:
    model = control("attention(keep=0.5, blocks=[2])")
    block = model.trace(images()).blocks[2]
    with torch.no_grad():
        _, weights = after_attention(model.vit, 2, block.attention.tokens())
    best = weights.mean(1)[:, 0, 1:].topk(18).indices
    expected = torch.zeros(3, 36, dtype=torch.bool).scatter(1, best, True)
    assert torch.equal(block.active(), expected)


@pytest.mark.parametrize("name", ["attention", "evit"])
def test_without_a_class_token_received_attention_decides(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomise(vit(class_token=False, global_pool="avg")).eval()
    reduced = foveate.apply(model, name, keep=0.5, blocks=[2]).eval()
    assert "no class token" in caplog.text
    block = reduced.trace(images()).blocks[2]
    with torch.no_grad():
        _, weights = after_attention(model, 2, block.attention.tokens())
    best = weights.mean(1).mean(1).topk(18).indices
    expected = torch.zeros(3, 36, dtype=torch.bool).scatter(1, best, True)
    assert torch.equal(block.active(), expected)


@pytest.mark.parametrize("name", ["attention", "random", "static", "dynamicvit", "evit"])
def test_recall_before_the_head_brings_patches_back_at_their_last_value(name: str) -> None:
    model = control(f"{name}(keep=0.5)", global_pool="avg")
    dropping = model.tokens(images())
    preserving = foveate.apply(model.vit, f"{name}(keep=0.5, recall_before='head')").eval()
    preserving.reducer.load_state_dict(model.reducer.state_dict())
    final = preserving.tokens(images())
    assert final.counts == (36,) * 3 and (final.source >= 0).all()
    assert torch.equal(final.restore(), dropping.restore("last"))
    pooled = dropping.restore("last").mean(1)
    head = model.vit.head(model.vit.fc_norm(pooled))
    torch.testing.assert_close(logits(preserving, images()), head.detach())
