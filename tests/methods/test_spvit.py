"""SPViT: selectors, and the package that keeps what was dropped."""

from __future__ import annotations

import pytest
import torch
from small import batch_state, images, keep_masks, randomise, vit
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.core import BlockTrace, ReducedViT, TokenState
from foveate.methods.spvit import Grouped, Selector, SPViT


def spvit(options: str = "keep=0.7", **changes: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**changes)), f"spvit({options})")
    randomise(model.reducer, seed=1)
    return balanced(model.eval())


@torch.no_grad()
def balanced(model: ReducedViT) -> ReducedViT:
    """Move the gates one after the other so that each keeps some patches and drops some."""
    for block, selector in zip(model.reducer.active_blocks, model.reducer.selectors, strict=True):
        log_prob, _ = selector(model.trace(images()).blocks[block - 1].output)
        odds = log_prob[:, 0] - log_prob[:, 1]
        selector.predictors.rest[-1].bias[..., 0] -= odds.quantile(0.4)
    return model


def probabilities(model: ReducedViT, stage: int, state: TokenState) -> tuple[Tensor, Tensor]:
    """Keep decision and keep probability of every token after the prefix, ``[B, N]``."""
    with torch.no_grad():
        log_prob, keep = model.reducer.selectors[stage](state)
    both = state.after_prefix(torch.cat([log_prob, keep[:, None]], 1))
    return both[..., 0] >= both[..., 1], both[..., 2]


def entering(blocks: list[BlockTrace], stage: int) -> TokenState:
    return blocks[stage].output  # stages start at blocks 1, 2, 3


@pytest.mark.parametrize("package", ["mean", "sum"])
def test_the_package_is_the_weighted_mean_of_what_a_stage_dropped(package: str) -> None:
    model = spvit(f"keep=0.7, package='{package}'")
    blocks = model.trace(images()).blocks
    for stage in range(3):
        before, after = entering(blocks, stage), blocks[stage + 1].attention
        keep, prob = probabilities(model, stage, before)
        for b in range(3):
            row = slice(1, before.layout.lengths[b])
            x, packed = before.tokens()[b, row], before.layout.rect(before.place)[b, row] == 36
            n = len(x)
            dropped = ~keep[b, :n] & ~packed
            assert 0 < dropped.sum() < n - stage
            weight = prob[b, :n] * dropped
            expected = weight @ x / (weight.sum() if package == "mean" else 1)
            kept = x[keep[b, :n] | packed]
            got = after.tokens()[b, 1 : after.layout.lengths[b]]
            torch.testing.assert_close(got, torch.cat([kept, expected[None]]))


def test_packages_are_never_dropped() -> None:
    """Gates that close altogether leave one patch, and every stage's package."""
    model = spvit()
    for selector in model.reducer.selectors:
        selector.predictors.rest[-1].bias.data.copy_(torch.tensor([-50.0, 50.0]))
    for mode in ("packed", "masked"):
        model.mode = mode
        states = [block.attention for block in model.trace(images()).blocks[1:]]
        for stage, state in enumerate(states):
            # The second stage has only one patch left, which has to stay: nothing to pack.
            present = state.present()
            count = state.counts if present is None else tuple(present.sum(1).tolist())
            assert count == (2, 2, 2), (mode, stage)


def test_nothing_dropped_no_package() -> None:
    model = spvit()
    for selector in model.reducer.selectors:
        selector.predictors.rest[-1].bias.data.copy_(torch.tensor([50.0, -50.0]))
    model.mode = "packed"
    trace = model.trace(images())
    assert trace.counts() == [(37,) * 3] * 4
    model.mode = "masked"
    final = model.trace(images()).final
    assert final.alive[:, :37].all() and not final.alive[:, 37:].any()


def test_some_images_without_a_package() -> None:
    model = spvit()
    mask = keep_masks(3, (6, 6))
    mask[0] = False
    mask[0, 1, 1] = True  # its only patch stays
    for mode in ("packed", "masked"):
        model.mode = mode
        final = model.trace(images(), keep_mask=mask).final
        present = final.present()
        counts = final.counts if present is None else tuple(present.sum(1).tolist())
        assert counts[0] == 1 < counts[1]


def test_an_accumulating_package_stays_a_single_one() -> None:
    model = spvit("keep=0.7, accumulate=True, package='sum'")
    blocks = model.trace(images()).blocks
    for stage in range(3):
        before, after = entering(blocks, stage), blocks[stage + 1].attention
        guests = after.layout.rect(after.place, -1) == 36
        assert guests[:, 1:].sum(1).tolist() == [1] * 3
        if stage == 0:
            continue
        keep, prob = probabilities(model, stage, before)
        for b in range(3):
            row = slice(1, before.layout.lengths[b])
            x, packed = before.tokens()[b, row], before.layout.rect(before.place)[b, row] == 36
            weight = prob[b, : len(x)] * (~keep[b, : len(x)] & ~packed)
            old, new = x[packed][0], after.tokens()[b, 1:][guests[b, 1:]][0]
            torch.testing.assert_close(new, old + weight @ x)


def linear(layer: Grouped, head: int, x: Tensor) -> Tensor:
    return x @ layer.weight[head] + layer.bias[head]


def naive_selector(selector: Selector, x: Tensor) -> tuple[Tensor, Tensor]:
    """As methods.md 5.1 has it, for the patches ``x [N, C]`` of one image."""
    heads = x.view(len(x), selector.heads, selector.dim)
    importance = selector.weigh(heads.mean(-1))
    log_prob, prob = 0, 0
    for h in range(selector.heads):
        all_heads, half = selector.predictors, selector.dim // 2
        own = h % len(all_heads.gain)
        norm = F.layer_norm(heads[:, h], (selector.dim,), all_heads.gain[own, 0])
        u = F.gelu(linear(all_heads.into, own, norm + all_heads.shift[own]))
        z = torch.cat([u[:, :half], u[:, half:].mean(0).expand(len(x), -1)], 1)
        z = F.gelu(linear(all_heads.first, own, z))
        z = F.gelu(linear(all_heads.rest[1], own, z))
        scores = linear(all_heads.rest[3], own, z)
        share = importance[:, h : h + 1] / importance.sum(1, True)
        log_prob = log_prob + share * scores.log_softmax(-1)
        prob = prob + share * scores.softmax(-1)
    return log_prob, prob[:, 0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("counts", [6, [5, 3, 7]], ids=str)
def test_selector(shared: bool, counts: int | list[int]) -> None:
    selector = randomise(Selector(3, 4, shared))
    assert len(selector.predictors.gain) == (1 if shared else 3)
    state = batch_state(counts, width=12)
    log_prob, prob = selector(state)
    row = 0
    for n in state.layout.lengths:
        part = slice(row + 1, row + n)
        expected = naive_selector(selector, state.x[part])
        torch.testing.assert_close(log_prob[part], expected[0])
        torch.testing.assert_close(prob[part], expected[1])
        row += n


def test_gradients_reach_the_selectors_through_the_package() -> None:
    """One stage before the last block, class token not pooled: the task is enough."""
    model = spvit("keep=[0.5], blocks=[3]").train()
    torch.manual_seed(0)
    model.run(images()).logits.square().sum().backward()
    for p in model.reducer.parameters():
        assert p.grad.abs().sum() > 0


def test_the_ratio_loss_holds_the_batch_to_absolute_targets() -> None:
    model = spvit("keep=[0.6, 0.4, 0.1]").train()
    torch.manual_seed(0)
    outcome = model.run(images())
    torch.manual_seed(0)
    terms = []
    for block, target in zip(model.trace(images()).blocks[1:], (0.6, 0.4, 0.1), strict=True):
        share = block.attention.alive[:, 1:37].mean()  # packages do not count
        terms.append((share - target) ** 2)
    got = model.reducer.losses(outcome)["ratio"]
    torch.testing.assert_close(got, torch.stack(terms).mean())
    assert SPViT.rule == "argmax" and not model.reducer.fixed_count
