"""EViT: the score, the order, and the fused token, computed again from timm's own block."""

from __future__ import annotations

import pytest
import torch
from small import Said, after_attention, batch_state, built, images, keep_masks, noise, randomise
from small import vit as small_vit

import foveate


def test_the_fused_token_is_the_sum_of_scored_tokens() -> None:
    model = randomise(small_vit()).eval()
    trace = foveate.apply(model, "evit", keep=0.6, blocks=[1]).eval().trace(images())
    with torch.no_grad():
        x, weights = after_attention(model, 1, trace.blocks[1].attention.tokens())
    score, fed = weights.mean(1)[:, 0, 1:], trace.blocks[1].mlp
    count = 22  # ceil(0.6 * 36)
    assert fed.layout.lengths == (1 + count + 1,) * 3
    for b in range(3):
        order = score[b].argsort(descending=True)
        expected = [x[b, 0], *(x[b, 1 + i] for i in order[:count])]
        expected.append(sum(score[b, i] * x[b, 1 + i] for i in order[count:]))
        torch.testing.assert_close(fed.tokens()[b], torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_without_fusing_the_rest_is_gone() -> None:
    row = noise(2, 3, 11).exp()
    state = batch_state(10)
    after = built("evit(keep=0.5, rest='drop')", grid=(1, 10)).between(1, state, Said(row))
    best = row.mean(1)[:, 1:].topk(5).indices
    for b in range(2):
        assert torch.equal(after.tokens()[b, 1:], state.tokens()[b, 1:][best[b]])


def test_a_fused_token_competes_and_may_be_fused_again() -> None:
    """It is the best at the second stage and the worst at the third."""
    evit = built("evit(keep=0.5)", grid=(1, 10))
    state = batch_state(10)
    state = evit.between(1, state, Said(noise(2, 3, 11).exp()))
    assert state.counts == (6, 6)  # 5 + 1
    fused = state.tokens()[:, -1]
    row = noise(2, 3, 7, seed=1).exp()
    row[..., -1] = 100
    state = evit.between(2, state, Said(row))
    assert state.counts == (4, 4)  # 3 + 1
    assert torch.equal(state.tokens()[:, 1], fused)
    row = noise(2, 3, 5, seed=2).exp()
    row[..., 1] = 1e-3
    third = evit.between(3, state, Said(row))
    dropped = row.mean(1)[:, 1:].argsort(1)[:, :2]
    for b in range(2):
        assert 0 in dropped[b]
        expected = sum(row.mean(1)[b, 1 + i] * state.tokens()[b, 1 + i] for i in dropped[b])
        torch.testing.assert_close(third.tokens()[b, -1], expected)


def test_prefix_tokens_are_no_candidates() -> None:
    """The release would drop a distillation token; here even a score of zero does not matter."""
    evit = built("evit(keep=0.5)", prefix=3, grid=(1, 8))
    state = batch_state(8, prefix=3)
    row = noise(2, 3, 11).exp()
    row[..., :3] = 0
    after = evit.between(1, state, Said(row))
    assert torch.equal(after.prefix_tokens(), state.prefix_tokens())
    assert after.counts == (5, 5)


def test_images_that_drop_nothing_fuse_nothing() -> None:
    model = foveate.apply(randomise(small_vit()).eval(), "evit(keep=0.7)").eval()
    mask = keep_masks(3, (6, 6))
    mask[0] = False
    mask[0, 2, 3] = True  # a single patch: ceil(0.7 * 1) is that one
    trace = model.trace(images(), keep_mask=mask)
    for block in trace.blocks:
        assert block.mlp.counts[0] == 1
    assert trace.blocks[1].mlp.counts[1] == -(-7 * int(mask[1].sum()) // 10) + 1
    assert torch.isfinite(trace.logits).all()


@pytest.mark.parametrize("mode", ["gathered", "packed"])
def test_warm_up_moves_the_counts(mode: str) -> None:
    model = foveate.apply(
        randomise(small_vit()).eval(), "evit", keep=0.5, blocks=[1], warmup=(0.0, 1.0), rest="drop"
    )
    model.mode = mode
    for progress, count in ((0.0, 36), (0.5, 27), (1.0, 18)):
        model.set_progress(progress)
        assert set(model.trace(images()).counts()[1]) == {1 + count}
