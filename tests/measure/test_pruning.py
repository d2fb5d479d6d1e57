"""Pruning without training."""

from __future__ import annotations

import pytest
import torch
from batches import demo_batches, small_batches
from small import randomise, vit

import foveate
from foveate.data.demo import demo_vit
from foveate.measure import one, prune, pruning, select
from foveate.measure.occlusion import keep_order, kept_patches


def entering(model, images) -> list[tuple[int, ...]]:
    """Patches over which each block attends."""
    blocks = model.eval().trace(images).blocks
    return [block.attention.counts for block in blocks]


@pytest.mark.parametrize("method", ["random", "attention"])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_counts_before_the_three_stages(method: str, rate: float) -> None:
    images = next(iter(demo_batches(2)()))[0]
    found = entering(prune(demo_vit(), method, rate, images=[0, 1]), images)
    wanted = [49] * 3 + [int(49 * rate**stage) for stage in (1, 2, 3) for _ in range(3)]
    assert found == [(n, n) for n in wanted]


def test_scores_are_class_attention_of_the_previous_block() -> None:
    """Against attention taken by hand off the plain model, before anything is dropped."""
    model = randomise(vit(depth=4)).eval()
    images = next(iter(small_batches(3)()))[0]
    first = prune(model, "attention", 0.5).eval().trace(images).blocks[1].attention
    norm, attn = model.blocks[0].norm1, model.blocks[0].attn
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        q, k, _ = attn.qkv(norm(x)).view(3, 37, 3, 3, 16).permute(2, 0, 3, 1, 4)
        weights = (q[:, :, :1] @ k.transpose(-2, -1) * 16**-0.5).softmax(-1)
    score = weights[:, :, 0, 1:].mean(1)
    best = score.topk(18).indices.sort(1).values
    kept = (first.source >= 0).nonzero()[:, 1].view(3, 18)
    assert torch.equal(kept, best)
    with torch.no_grad():  # and what stays is what the whole block makes of it
        whole = model.blocks[0](x)[:, 1:].gather(1, best[..., None].expand(-1, -1, 48))
    order = first.source.gather(1, best)[..., None].expand(-1, -1, 48)
    torch.testing.assert_close(first.tokens().gather(1, order), whole, rtol=1e-4, atol=1e-5)


def test_chance_is_of_seed_and_image_alone_and_as_in_the_occlusion_curve() -> None:
    batches = list(small_batches(4, batch=4)())
    images, _, indices = batches[0]
    model = randomise(vit(depth=4)).eval()

    def kept(seed: int, part: slice) -> list[torch.Tensor]:
        reduced = prune(model, "random", 0.5, seed=seed, images=indices[part].tolist())
        return [block.attention.source >= 0 for block in reduced.trace(images[part]).blocks]

    whole = kept(7, slice(None))
    order = keep_order(indices, 36, 7)
    for stage, mask in enumerate(whole):
        assert torch.equal(mask, kept_patches(order, int(36 * 0.5**stage)))
    for mask, alone in zip(whole, kept(7, slice(2, 3)), strict=True):
        assert torch.equal(mask[2:3], alone)
    assert not torch.equal(kept(8, slice(None))[1], whole[1])


def test_rows() -> None:
    model, batches = demo_vit(), demo_batches(30, 12)
    found = pruning(model, batches, rates=[0.7, 0.3], seeds=[2, 5], classes=10)
    pairs = list(dict.fromkeys(zip(found["method"], found["rate"], strict=True)))
    assert pairs == [*(("random", 0.3), ("random", 0.7), ("attention", 0.3), ("attention", 0.7))]
    for method, rate in pairs:
        own = select(found, method=method, rate=rate)
        kept = select(own, metric="kept")
        assert kept["at"].tolist() == [3, 6, 9]
        assert kept["value"].tolist() == [int(49 * rate**stage) for stage in (1, 2, 3)]
        for seed in (2, 5) if method == "random" else (None,):
            right = 0
            for images, labels, indices in demo_batches(30, 1)():
                alone = prune(model, method, rate, seed=seed or 0, images=indices.tolist())
                with torch.no_grad():
                    right += int(alone.eval()(images).argmax(1) == labels)
            assert one(own, "top1", draw=seed) == 100 * right / 30
        assert len(select(own, metric="top1")) == (2 if method == "random" else 1)
        assert one(own, "macs") == foveate.count(alone).macs and one(own, "images") == 30


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="of plain models; this one has tome"):
        pruning(foveate.apply(vit(), "tome(r=2)"), small_batches())
    with pytest.raises(ValueError, match=r"pruning rates must lie in \(0, 1\], got 0"):
        pruning(vit(), small_batches(), rates=[0])
    with pytest.raises(ValueError, match="'random', 'attention'; got 'evit'"):
        prune(vit(), "evit", 0.5)
