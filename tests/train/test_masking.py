"""Which patches are hidden, and that all ways to compute the rest are one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from runs import small_model
from small import hf, noise
from torch import Tensor
from torch.nn import functional as F

from foveate.train.draws import Draws, seed_step
from foveate.train.finetune import FinetuneTask
from foveate.train.masking import draw_masks, kept_patches
from foveate.train.recipe import Masking


@pytest.mark.parametrize("patches", [16, 49, 196])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 0.95, 1.0])
def test_counts_are_rounded_down(patches: int, ratio: float) -> None:
    exact = patches * (100 - round(100 * ratio)) // 100  # in whole numbers
    assert kept_patches(patches, ratio) == exact
    keep = draw_masks([ratio], 5, patches, Draws(0, 1, 2))
    assert keep.dtype == torch.bool and keep.sum(1).tolist() == [exact] * 5


def test_every_patch_is_as_likely() -> None:
    kept = sum(draw_masks([0.75], 500, 16, Draws(0, 0, step)).sum(0) for step in range(8))
    share = kept / 4000
    assert float((share - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_ratios_are_drawn_for_each_image() -> None:
    counts = draw_masks([0, 0.25, 0.5, 0.75], 4000, 16, Draws(0, 0, 0)).sum(1)
    for kept in (16, 12, 8, 4):
        share = float((counts == kept).float().mean())
        assert share == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 4000))
    # Independent of the one before: in a table of neighbours all 16 pairs are as likely.
    pairs = torch.stack([counts[:-1], counts[1:]], 1).unique(dim=0, return_counts=True)[1]
    assert len(pairs) == 16 and float(pairs.max() - pairs.min()) < 150


def test_stratified_deals_them_out() -> None:
    counts = draw_masks([0, 0.5, 0.75], 7, 16, Draws(0, 0, 0), stratified=True).sum(1).tolist()
    assert counts == [16, 8, 4, 16, 8, 4, 16]


@pytest.mark.parametrize("stratified", [False, True])
def test_masks_do_not_depend_on_the_process(stratified: bool) -> None:
    whole = draw_masks([0, 0.5, 0.75], 6, 16, Draws(3, 1, 4), stratified=stratified)
    parts = [
        draw_masks([0, 0.5, 0.75], 2, 16, Draws(3, 1, 4, rank=rank, world=3), stratified=stratified)
        for rank in range(3)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_draws_are_of_the_step_alone() -> None:
    def drawn(*place: int) -> Tensor:
        return Draws(*place).uniform(4, 3)

    assert torch.equal(drawn(0, 1, 2), drawn(0, 1, 2))
    others = [drawn(*place) for place in ((0, 1, 3), (0, 2, 2), (1, 1, 2), (0, 2, 1), (2, 1, 0))]
    assert not any(torch.equal(drawn(0, 1, 2), other) for other in others)
    draws = Draws(0, 1, 2)
    assert not torch.equal(draws.uniform(4, 3), draws.uniform(4, 3))


def test_noise_differs_between_processes() -> None:
    def drawn(*place: int) -> float:
        seed_step(*place)
        return float(torch.rand(()))

    assert drawn(0, 1, 2, 0) == drawn(0, 1, 2, 0) != drawn(0, 1, 2, 1)


# The model ---------------------------------------------------------------------------------------


def slowly(model: Any, images: Tensor, keep: Tensor) -> Tensor:
    """Image by image by timm's own blocks: embed, take out, go on."""
    found = []
    for image, stays in zip(images, keep, strict=True):
        tokens = model.patch_embed(image[None])
        x = torch.cat([model.cls_token, tokens], 1) + model.pos_embed
        x = x[:, torch.cat([torch.tensor([True]), stays])]
        for block in model.blocks:
            x = block(x)
        found.append(model.forward_head(model.norm(x)))
    return torch.cat(found)


RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def masked(model: Any, ratios: tuple[float, ...], backend: str = "bucket") -> FinetuneTask:
    return FinetuneTask(model, 10, masking=Masking(ratios=ratios, backend=backend))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_bucket_and_keymask_are_the_slow_loop(pool: str) -> None:
    """Logits, loss and every gradient; a class token alone gives finite numbers."""
    ratios = RATIOS if pool == "token" else RATIOS[:-1]
    model = small_model(global_pool=pool)
    images, targets = noise(12, 1, 28, 28), torch.arange(12) % 10
    found = {}
    for backend in ("bucket", "keymask", "loop"):
        model.zero_grad()
        if backend == "loop":
            keep = draw_masks(ratios, 12, 16, Draws(0, 0, 0))
            assert {*keep.sum(1).tolist()} == {int(16 * (1 - r)) for r in ratios}
            logits = slowly(model, images, keep)
            loss = F.cross_entropy(logits, targets)
        else:
            task = masked(model, ratios, backend)
            batch = {"image": images, "label": targets}
            loss = task.training_step(batch, Draws(0, 0, 0))["class"]
            logits = task.logits(images, Draws(0, 0, 0))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found[backend] = {"logits": logits.detach(), "loss": loss.detach(), **gradients}
    assert bool(found["loop"]["logits"].isfinite().all())
    for backend in ("bucket", "keymask"):
        for name, value in found["loop"].items():
            torch.testing.assert_close(found[backend][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_all_patches_hidden_is_finite() -> None:
    for backend in ("bucket", "keymask"):
        task = masked(small_model(), (1.0,), backend)
        images = noise(4, 1, 28, 28)
        batch = {"image": images, "label": torch.arange(4)}
        task.training_step(batch, Draws(0, 0, 0))["class"].backward()
        logits = task.logits(images, Draws(0, 0, 0)).detach()
        assert bool(logits.isfinite().all())
        assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-5)
        gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
        assert all(bool(grad.isfinite().all()) for grad in gradients)


@pytest.mark.parametrize("ratio", [1.0, 0.95])
def test_nothing_left_to_pool_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"masking.ratios holds {ratio:g}, which leaves nothing"):
        masked(small_model(global_pool="avg"), (0.5, ratio))
    masked(small_model(global_pool="avg"), (0.5, 0.9))


def test_no_masks_is_the_model_itself() -> None:
    model = small_model()
    task = FinetuneTask(model, 10)
    images = noise(3, 1, 28, 28)
    assert torch.equal(task.logits(images, Draws(0, 0, 0)), model(images))


def test_drop_path_drops_whole_images_of_masked_batches() -> None:
    """Driven flat, a branch is dropped for an image and not for a token."""
    from foveate.backbones import backbone_for
    from foveate.train.models import set_drop_path

    model = small_model(depth=2)
    set_drop_path(backbone_for(model), 0.999)
    assert [type(block.drop_path1).__name__ for block in model.blocks] == ["Identity", "DropPath"]
    task = masked(model, (0.5,))
    images = noise(2, 1, 28, 28)
    torch.manual_seed(0)
    dropped = task.logits(images, Draws(0, 0, 0))
    model.blocks[1].attn.proj.weight.data.zero_()
    model.blocks[1].attn.proj.bias.data.zero_()
    model.blocks[1].mlp.fc2.weight.data.zero_()
    model.blocks[1].mlp.fc2.bias.data.zero_()
    without = task.logits(images, Draws(0, 0, 0))
    torch.testing.assert_close(dropped, without)


def test_models_of_transformers_can_be_masked() -> None:
    pytest.importorskip("transformers")
    model = hf("ViTForImageClassification").train()
    task = masked(model, (0.5,))
    batch = {"image": noise(2, 3, 48, 48), "label": torch.arange(2)}
    task.training_step(batch, Draws(0, 0, 0))["class"].backward()
    assert all(p.grad is not None for p in model.parameters())
