"""The occlusion curve."""

from __future__ import annotations

import pytest
import torch
from batches import demo_batches, made, small_batches
from small import eva, hf, noise, randomise, vit

import foveate
from foveate.backbones import backbone_for
from foveate.core import dense
from foveate.data.demo import demo_vit
from foveate.measure import RATIOS, accuracy, occlusion, one, select
from foveate.measure.occlusion import keep_order, kept_patches


def column(table, metric: str, **keys: object) -> list[float]:
    return select(table, metric=metric, **keys)["value"].tolist()


def test_masks_are_nested_and_of_seed_and_image_alone() -> None:
    order = keep_order(torch.tensor([3, 8, 5]), 49, 7)
    assert torch.equal(order[2:], keep_order(torch.tensor([5]), 49, 7))
    assert not torch.equal(order, keep_order(torch.tensor([3, 8, 5]), 49, 8))
    assert not torch.equal(order[0], order[1])
    assert torch.equal(order.sort(1).values, torch.arange(49).expand(3, -1))
    more, fewer = kept_patches(order, 20), kept_patches(order, 5)
    assert more.sum(1).tolist() == [20] * 3 and bool((more | ~fewer).all())
    assert not kept_patches(order, 0).any()


def test_masks_are_the_same_in_every_run() -> None:
    """Curves of two runs, or of two versions, are comparable only then."""
    assert keep_order(torch.tensor([12]), 6, 1).tolist() == [[2, 3, 5, 1, 4, 0]]


def test_patches_are_dropped_evenly() -> None:
    masks = kept_patches(keep_order(torch.arange(4000), 16, 0), 4).float()
    assert (masks.mean(0) - 0.25).abs().max() < 0.03


def test_nothing_dropped_is_plain_accuracy() -> None:
    model = demo_vit()
    curve = occlusion(model, demo_batches(), ratios=[0.0], seeds=2)
    assert one(curve, "top1") == accuracy(model, demo_batches()).top1  # masks are alike
    assert one(curve, "kept") == 49 and one(curve, "images") == 60


def test_counts_are_those_of_the_paper() -> None:
    curve = occlusion(demo_vit(), demo_batches(4), seeds=1)
    kept = select(curve, metric="kept")
    assert tuple(kept["at"]) == RATIOS and set(curve["draw"].dropna()) == {0}
    assert kept["value"].tolist() == [49, 44, 39, 34, 29, 24, 19, 14, 9, 4, 2]
    # 10 * (1 - 0.9) is a little less than one in floating point.
    model = vit(img_size=(8, 80))
    wide = made(noise(2, 3, 8, 80), torch.zeros(2).long(), 2)
    assert one(occlusion(model, wide, ratios=[0.9], seeds=1), "kept") == 1


FORMS = {
    "plain": vit,
    "average": lambda: vit(global_pool="avg"),
    "rotary": lambda: eva(use_rot_pos_emb=True),
    "hf": lambda: hf("ViTForImageClassification"),
    "reduced": lambda: foveate.apply(vit(), "evit(keep=0.7)"),
    "gathered": lambda: foveate.apply(vit(), "tome(r=3)"),
    "own count": lambda: foveate.apply(vit(), "ats(K=9)"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_slow_reference_image_by_image(form: str) -> None:
    model = randomise(FORMS[form]()).eval()
    if form == "gathered":
        model.mode = "gathered"
    count, ratios, seeds = 8, (0.25, 0.5, 0.9), (4, 9)
    images = noise(count, 3, 48, 48)
    # Labels are what the model says of whole images, so that accuracies lie between 0 and 1.
    reduced = isinstance(model, foveate.core.ReducedViT)
    driven = model if reduced else dense(backbone_for(model))
    with torch.no_grad():
        labels = driven.run(images).logits.argmax(1)
    curve = occlusion(model, made(images, labels, 3), ratios=ratios, seeds=seeds)
    if form == "gathered":
        assert model.mode == "gathered"
        model.mode = "auto"
    for ratio in ratios:
        kept = int(36 * (1 - ratio))
        assert one(curve, "kept", at=ratio) == kept
        for seed in seeds:
            value = one(curve, "top1", at=ratio, draw=seed)
            right = 0
            for index in range(count):
                order = keep_order(torch.tensor([index]), 36, seed)
                mask = kept_patches(order, kept)
                with torch.no_grad():
                    logits = driven.run(images[index : index + 1], mask).logits
                right += int(logits.argmax(1) == labels[index])
            assert value == 100 * right / count
    other = occlusion(model, made(images, labels, 8), ratios=ratios, seeds=seeds)
    assert other.equals(curve)


def test_dropped_patches_are_not_seen() -> None:
    """Real dropping: what stands in a dropped patch changes nothing."""
    images = noise(1, 3, 48, 48)
    mask = kept_patches(keep_order(torch.tensor([0]), 36, 0), 9)
    driven = dense(backbone_for(randomise(vit()).eval()))
    pixels = mask.view(1, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        first = driven.run(images, mask)
        other = driven.run(torch.where(pixels, images, 100.0), mask)
    assert torch.equal(first.logits, other.logits)
    assert first.state.counts == (9,)


def test_a_class_token_alone() -> None:
    curve = occlusion(demo_vit(), demo_batches(20), ratios=[1.0], seeds=2)
    top1 = column(curve, "top1")
    assert one(curve, "kept") == 0 and top1[0] == top1[1]  # the same answer for every image


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"occlusion ratios must lie in \[0, 1\], got 1.2"):
        occlusion(vit(), small_batches(), ratios=[1.2])
    with pytest.raises(ValueError, match="at least one is needed"):
        occlusion(vit(), small_batches(), ratios=[])
    with pytest.raises(ValueError, match="leaves none of 36 patches.*at most 0.972"):
        occlusion(vit(global_pool="avg"), small_batches(), ratios=[0.99])
    for seeds in (0, -1, [], [-2]):
        with pytest.raises(ValueError, match="seeds must be"):
            occlusion(vit(), small_batches(), seeds=seeds)
    with pytest.raises(ValueError, match="has 3 classes and the model 10"):
        occlusion(vit(), small_batches(), ratios=[0.5], classes=3)
