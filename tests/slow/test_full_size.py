"""Once at full size: the real architectures, every parameter randomised."""

from __future__ import annotations

from functools import lru_cache

import pytest
import timm
import torch
from contract.table import METHODS, randomise
from torch import Tensor, nn

import foveate
from foveate.core.cost import plan

pytestmark = pytest.mark.slow

MODELS = (
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "eva02_small_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224",
)


@lru_cache(maxsize=1)
def full_size(name: str) -> nn.Module:
    return randomise(timm.create_model(name, pretrained=False)).eval()


def noise(model: nn.Module, batch: int = 1) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_native_equals_driven(name: str) -> None:
    model = full_size(name)
    driven = foveate.apply(model, "random", keep=1.0).eval()  # with the self-check on
    x = noise(model)
    with torch.no_grad():
        native, ours = model(x), driven(x)
    assert (ours - native).abs().max() <= 1e-4 * native.abs().max()


@pytest.mark.parametrize("method", sorted({row.name for row in METHODS}))
def test_every_method_on_vit_b(method: str) -> None:
    model = full_size("vit_base_patch16_224")
    reduced = foveate.apply(model, method, check=False).eval()
    randomise(reduced.reducer, seed=1)
    trace = reduced.trace(noise(model, 2))
    assert torch.isfinite(trace.logits).all()
    expected = plan(reduced.backbone.spec, reduced.reducer, (14, 14))
    for counts, block in zip(trace.counts(), expected, strict=True):
        if reduced.reducer.fixed_count:
            assert set(counts) == {block.fed}
        else:
            assert all(1 <= n <= 200 for n in counts)
