"""Images of different sizes in one batch: each as it is alone, for every family."""

from __future__ import annotations

import pytest
import torch
from contract.table import FORMS, form, reduced
from small import close, logits, noise, vit

import foveate
from foveate.backbones import backbone_for
from foveate.core import dense

SIZES = ((48, 48), (32, 56), (48, 48), (40, 16))
TAKING = sorted(set(FORMS) - {"multiscale"})


def batch() -> list[torch.Tensor]:
    return [noise(3, *size, seed=n) for n, size in enumerate(SIZES)]


@pytest.mark.parametrize("name", TAKING)
@torch.no_grad()
def test_alone_equals_in_a_batch(name: str) -> None:
    for model in (dense(backbone_for(form(name))), reduced("svit(keep=0.7)", name)):
        state = model.tokens(batch())
        assert state.grid == (6, 7) and state.context.mode == "packed"
        grid = state.restore().unflatten(1, state.grid)
        for number, image in enumerate(batch()):
            alone = model.tokens(image[None])
            rows, columns = alone.grid
            close(grid[number, :rows, :columns].flatten(0, 1), alone.restore()[0], 2e-5)
            if state.prefix:
                close(state.prefix_tokens()[number], alone.prefix_tokens()[0], 2e-5)


@pytest.mark.parametrize("method", ["evit(keep=0.7)", "tome(r=3)", "ats(K=9)", "evovit"])
def test_methods_answer_alike_alone_and_in_a_batch(method: str) -> None:
    model = reduced(method, "vit")
    together = logits(model, batch())
    for number, image in enumerate(batch()):
        close(together[number], logits(model, image[None])[0], 2e-5)


def test_images_of_one_size_are_a_batch_like_any() -> None:
    model = reduced("evit(keep=0.7)", "dinov3")
    same = [batch()[0], batch()[2]]
    state = model.begin(same)
    assert state.context.mode == "gathered" and state.context.mask is None
    close(logits(model, same), logits(model, torch.stack(same)), 1e-6)


@torch.no_grad()
def test_a_mask_on_top_leaves_out_more() -> None:
    model = dense(backbone_for(form("vit")))
    mask = torch.ones(4, 6, 7, dtype=torch.bool)
    mask[:, :2] = False
    assert model.begin(batch(), mask).counts == (24, 14, 24, 6)


def test_refusals() -> None:
    model = foveate.apply(vit(), "evit", check=False)
    with pytest.raises(ValueError, match="the batch is empty"):
        model([])
    with pytest.raises(ValueError, match=r"must be \[channels, H, W\].* for image 1"):
        model([noise(3, 48, 48), noise(48, 48)])
    with pytest.raises(ValueError, match="image width 50 is not a multiple of the patch's 8"):
        model([noise(3, 48, 48), noise(3, 48, 50)])
    model.mode = "gathered"
    with pytest.raises(ValueError, match="images of different sizes differ in their token count"):
        model(batch())
