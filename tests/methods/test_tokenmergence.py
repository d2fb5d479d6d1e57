"""Token mergence: importance-weighted means, and who is merged into whom."""

from __future__ import annotations

import math

import pytest
import torch
from small import Said, after_attention, batch_state, built, images, keep_masks, noise, randomise
from small import vit as small_vit
from torch import Tensor

import foveate


def groups(x: Tensor, idx_keep: list[int], how: str, attention: Tensor) -> dict[int, list[int]]:
    """Which tokens of ``x [N, C]`` end up together, by kept token."""
    found = {i: [i] for i in idx_keep}
    for j in range(len(x)):
        if j in idx_keep:
            continue

        def likeness(i: int, j: int = j) -> float:
            if how == "cosine":
                return float(torch.cosine_similarity(x[i], x[j], dim=0))
            if how == "attention":
                return float(attention[j, i])
            return -float((x[i] - x[j]).norm(p=1 if how == "l1" else 2))

        found[max(idx_keep, key=likeness)].append(j)
    return found


@pytest.mark.parametrize("how", ["cosine", "l1", "l2", "attention"])
def test_every_other_patch_joins_the_most_similar_kept_one(how: str) -> None:
    model = randomise(small_vit()).eval()
    method = f"tokenmergence(keep=0.4, blocks=[1], similarity='{how}')"
    trace = foveate.apply(model, method).eval().trace(images())
    with torch.no_grad():
        x, weights = after_attention(model, 1, trace.blocks[1].attention.tokens())
    score, maps = weights.mean(1)[:, 0, 1:], weights.mean(1)[:, 1:, 1:]
    fed = trace.blocks[1].mlp
    assert fed.layout.lengths == (1 + 15,) * 3
    assert fed.size is None  # importance weighs, sizes are not kept
    for b in range(3):
        idx_keep = score[b].argsort(descending=True)[:15].tolist()
        expected = [x[b, 0]]
        for members in groups(x[b, 1:], idx_keep, how, maps[b]).values():
            w = score[b, members]
            expected.append((w[:, None] * x[b, 1:][members]).sum(0) / w.sum())
        torch.testing.assert_close(fed.tokens()[b], torch.stack(expected), atol=2e-5, rtol=1e-4)


def test_equal_weights_give_the_plain_mean_of_a_group() -> None:
    state = batch_state(8)
    row = torch.full((2, 3, 9), 0.1)
    state = state.replace(
        source=torch.arange(1, 9).expand(2, 8), canvas=state.tokens()[:, 1:].clone()
    )
    after = built("tokenmergence(keep=0.5)", grid=(1, 8)).between(1, state, Said(row))
    assert after.counts == (4, 4)
    for b in range(2):
        for token in range(1, 5):
            group = (after.source[b] == token).nonzero().flatten()
            mean = state.tokens()[b, 1 + group].mean(0)
            torch.testing.assert_close(after.tokens()[b, token], mean)
    assert (after.source > 0).all()  # nothing is dropped


def test_prefix_tokens_are_no_targets() -> None:
    state = batch_state(8, prefix=2)
    x = state.tokens().clone()
    x[:, 2:] = x[:, :1] + 0.01 * noise(2, 8, 4)  # every patch resembles the class token
    state = state.replace(x=x.flatten(0, 1))
    reducer = built("tokenmergence(keep=0.5)", prefix=2, grid=(1, 8))
    after = reducer.between(1, state, Said(noise(2, 3, 10).exp()))
    assert torch.equal(after.prefix_tokens(), state.prefix_tokens())
    assert after.counts == (4, 4)


def test_random_partners_repeat() -> None:
    model = randomise(small_vit()).eval()
    reduced = foveate.apply(model, "tokenmergence(keep=0.5, similarity='random')").eval()
    first, second = reduced.trace(images()), reduced.trace(images())
    assert torch.equal(first.final.source, second.final.source)
    alone = reduced.trace(images()[1:2])
    assert torch.equal(alone.final.source[0], first.final.source[1])
    assert len(first.blocks[1].output.patch_counts().unique()) > 2  # not all into one


def test_only_what_is_there_is_merged() -> None:
    reduced = foveate.apply(randomise(small_vit()).eval(), "tokenmergence(keep=0.5)").eval()
    mask = keep_masks(3, (6, 6))
    final = reduced.trace(images(), keep_mask=mask).final
    assert torch.equal(final.source >= 0, mask.flatten(1))
    assert final.counts == tuple(
        math.ceil(math.ceil(math.ceil(n / 2) / 2) / 2) for n in mask.sum((1, 2)).tolist()
    )


def test_the_map_is_asked_for_only_where_it_is_read() -> None:
    assert built("tokenmergence").reads == {"cls_row"}
    assert built("tokenmergence(similarity='attention')").reads == {"cls_row", "full_map"}
    with pytest.raises(ValueError, match="similarity must be one of 'cosine'"):
        built("tokenmergence(similarity='dot')")
