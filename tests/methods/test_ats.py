"""ATS: what its sampler keeps, its two scores, its options."""

from __future__ import annotations

import pytest
import torch
from small import Said, batch_state, built, images, keep_masks, logits, noise, randomise, vit
from torch import Tensor

import foveate
from foveate.core import TokenState


def sample(method: str, row: Tensor, length: Tensor | None = None) -> TokenState:
    """Let ATS act in block 1 on tokens with these scores ``[B, H, N]``, class token included."""
    length = torch.ones_like(row) if length is None else length
    state = batch_state([row.shape[2] - 1] * row.shape[0])
    state = state.replace(extras={"at": torch.arange(row.shape[2]).repeat(row.shape[0])})
    return built(method).between(1, state, Said(row, length))


def kept(state: TokenState) -> list[list[int]]:
    """Positions of the patches that stayed."""
    rows = state.extras["at"].split(list(state.layout.lengths))
    assert all(row[0] == 0 for row in rows)  # the class token is no candidate
    return [(row[1:] - 1).tolist() for row in rows]


@pytest.mark.parametrize("patches", [1, 7, 196])
def test_uniform_scores_keep_everything(patches: int) -> None:
    row = torch.full((2, 3, patches + 1), 1 / (patches + 1))
    assert kept(sample("ats", row)) == [list(range(patches))] * 2


def test_a_dominant_score_keeps_few_and_images_differ() -> None:
    row = torch.full((2, 3, 197), 1e-4)
    row[1, :, 51] = 1.0
    flat, peaked = kept(sample("ats", row))
    assert len(flat) == 196 and len(peaked) <= 6 and 50 in peaked


@pytest.mark.parametrize("k", [1, 5, 40, 120])
def test_fewer_than_all(k: int) -> None:
    row = noise(3, 2, 197).exp()
    for rows in kept(sample(f"ats(K={k})", row)):
        assert 1 <= len(rows) <= k and rows == sorted(rows)
    assert kept(sample(f"ats(K={k})", row)) == kept(sample(f"ats(K={k})", row))


def test_the_score_multiplies_attention_and_value_length_head_by_head() -> None:
    """Token 3 is attended to by a head in which its value is zero: it counts for nothing."""
    row, length = torch.full((1, 2, 9), 1e-9), torch.ones(1, 2, 9)
    row[0, 0, 4], length[0, 0, 4] = 1.0, 0.0
    row[0, 1, 7] = 1e-3
    # All the mass lies at token 6; the value before it is the running sum's at token 5.
    assert kept(sample("ats(K=4)", row, length))[0][-1] == 6
    assert 3 not in kept(sample("ats(K=4)", row, length))[0]
    length[0, 1, 4] = 5.0  # the release takes the length of the whole value
    assert 3 in kept(sample("ats(K=4, variant='release')", row, length))[0]


def naive_release(score: list[float], k: int) -> set[int]:
    order = sorted(range(len(score)), key=lambda i: score[i])
    running, cdf = 0.0, []
    for i in order:
        running += score[i]
        cdf.append(running)
    cdf = [(c - cdf[0]) / (cdf[-1] - cdf[0]) for c in cdf]
    start = min(c for c in cdf if c > 0)
    hit = set()
    for step in range(k):
        point = start + (1 - start) * step / (k - 1)
        hit.add(min(range(len(cdf)), key=lambda i: abs(cdf[i] - point)))
    return {order[i] for i in hit}


@pytest.mark.parametrize("k", [5, 12])
def test_the_release_sorts_and_stretches(k: int) -> None:
    row, length = noise(3, 2, 31).exp(), noise(3, 2, 31, seed=1).abs()
    got = kept(sample(f"ats(K={k}, variant='release')", row, length))
    score = row.double().sum(1) * length.double().square().sum(1).sqrt()
    for b in range(3):
        assert set(got[b]) == naive_release(score[b, 1:].tolist(), k)


def test_one_stage_or_many_each_with_its_number() -> None:
    model = randomise(vit()).eval()
    for method, blocks in (("ats(K=9)", (1, 2, 3)), ("ats(K=9, blocks=[2])", (2,))):
        counts = foveate.apply(model, method).trace(images()).counts()
        for block in range(4):
            most = 37 if block < blocks[0] else 10
            assert max(counts[block]) <= most and (most == 10 or min(counts[block]) == 37)
    counts = foveate.apply(model, "ats(K=[30, 3, 1])").trace(images()).counts()
    assert [max(c) for c in counts[2:]] == [4, 2]
    with pytest.raises(ValueError, match="K has 2 entries for 3 blocks"):
        foveate.apply(model, "ats(K=[3, 2])")


def test_under_a_keep_mask_only_live_patches_are_sampled() -> None:
    model = foveate.apply(randomise(vit()).eval(), "ats(K=8)").eval()
    mask = keep_masks(3, (6, 6))
    trace = model.trace(images(), keep_mask=mask)
    for block in trace.blocks:
        assert not (block.active() & ~mask.flatten(1)).any()


def test_gradients_pass_but_not_through_the_choice() -> None:
    """Training with real tensors: values have gradients, indices have none."""
    model = foveate.apply(randomise(vit()), "ats(K=8)").train()
    model(images()).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert torch.equal(logits(model.eval(), images()), logits(model.eval(), images()))
