"""Once at full size: what is driven is the model itself, and every method runs on ViT-B."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import timm
import torch
from small import logits, noise, randomise
from torch import Tensor, nn

import foveate
from foveate.api import check_driven
from foveate.backbones import backbone_for

pytestmark = pytest.mark.slow

MODELS = [
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "eva02_small_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224",
]


def full_size(name: str) -> nn.Module:
    """timm's model with every parameter random: LayerScale near 1, biases not zero."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name)).eval()


def pictures(model: nn.Module, batch: int = 2) -> Tensor:
    """Random images of the model's own size, with coarse structure."""
    height, width = model.patch_embed.img_size
    coarse = nn.functional.interpolate(noise(batch, 3, 9, 9), (height, width), mode="bilinear")
    return coarse + 0.5 * noise(batch, 3, height, width, seed=1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_native_equals_driven(name: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    model = full_size(name)
    x = pictures(model)
    driven = foveate.apply(model, "random(keep=1.0)", check=False).eval()
    with torch.no_grad():
        assert relative(driven(x), model(x)) < 2e-5
        own = model.forward_intermediates(x, norm=True, intermediates_only=True)
        for block, (a, b) in enumerate(
            zip(
                driven.forward_intermediates(x, norm=True, intermediates_only=True),
                own,
                strict=True,
            )
        ):
            assert relative(a, b) < 2e-5, block
    check_driven(backbone_for(model))
    # The comparison is sharp: without the attention of a single block it would fail.
    attention = model.blocks[len(model.blocks) // 2].attn
    attention.forward = lambda x, *_, **__: 0 * x  # a replaced forward is not driven
    with torch.no_grad():
        assert relative(driven(x), model(x)) > 1e-3
    with pytest.raises(ValueError, match=f"block {len(model.blocks) // 2} differs"):
        check_driven(backbone_for(model))


@pytest.fixture(scope="module")
def vit_base() -> Iterator[tuple[nn.Module, Tensor]]:
    model = full_size("vit_base_patch16_224")
    yield model, pictures(model)
    gc.collect()


@pytest.mark.parametrize("method", foveate.list_methods())
def test_every_method_on_vit_base(method: str, vit_base: tuple[nn.Module, Tensor]) -> None:
    model, x = vit_base
    driven = foveate.apply(model, method, check=False).eval()
    randomise(driven.reducer, seed=1)
    trace = driven.trace(x)
    assert trace.logits.shape == (2, 1000) and torch.isfinite(trace.logits).all()
    if driven.reducer.fixed_count:
        expected = foveate.count(driven).tokens
        assert trace.counts() == [(count, count) for count in expected]
    assert max(max(counts) for counts in trace.counts()) <= 197 + 3
    assert min(min(counts) for counts in trace.counts()) < 197
    assert torch.equal(logits(driven, x), trace.logits)
    alone = logits(driven, x[:1])
    assert relative(alone, trace.logits[:1]) < 1e-4
    assert driven.tokens(x).restore().shape == (2, 196, 768)
