"""Dense models of transformers on our backbones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import randomise, vit
from torch import nn

import foveate
from foveate.dense import adapter, pyramid

transformers = pytest.importorskip("transformers")
from foveate.dense.hf import as_backbone, reduce_backbone  # noqa: E402

SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4},
    **{"image_size": 32, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
}


def dpt(reshape: bool = False, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    inside = transformers.Dinov2Config(
        **{**SMALL, "reshape_hidden_states": reshape, "apply_layernorm": True, **changes}
    )
    config = transformers.DPTConfig(
        backbone_config=inside,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    return randomise(transformers.DPTForDepthEstimation(config)).eval()


def uper(channels: list[int]) -> nn.Module:
    """UperNet for maps of these channels, with a small network where ours will be."""
    torch.manual_seed(0)
    inside = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=channels,
        depths=[1] * len(channels),
        layer_type="basic",
        out_features=[f"stage{n + 1}" for n in range(len(channels))],
    )
    config = transformers.UperNetConfig(
        backbone_config=inside, hidden_size=16, num_labels=5, use_auxiliary_head=False
    )
    return transformers.UperNetForSemanticSegmentation(config).eval()


def test_dpt_on_dinov2_is_itself_without_reduction_and_cheaper_with() -> None:
    theirs = dpt()
    images = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        wanted = theirs(images).predicted_depth
        ours = copy.deepcopy(theirs)
        weights = ours.backbone.encoder.layer[0].norm1.weight
        assert reduce_backbone(ours, "tome(r=0)") is ours
        torch.testing.assert_close(ours(images).predicted_depth, wanted, atol=1e-5, rtol=1e-4)
        assert any(weights is parameter for parameter in ours.parameters())
        reduced = reduce_backbone(copy.deepcopy(theirs), "tome(r=0.2)")
        found = reduced(images).predicted_depth
    assert found.shape == wanted.shape and not torch.allclose(found, wanted, atol=1e-3)
    counts = reduced.backbone.inside.trace(images).counts()
    assert [block[0] for block in counts] == [81 - 16 * n for n in range(1, 5)]


@pytest.mark.parametrize("make", [adapter, pyramid])
def test_upernet_on_a_dense_backbone(make: Any) -> None:
    reduced = foveate.apply(randomise(vit()), "svit(keep=0.5)", check=False)
    maps = as_backbone(make(reduced)).eval()
    model = uper(maps.channels)
    model.backbone = maps
    images = torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        assert model(images).logits.shape == (2, 5, 64, 128)
    model.train()
    loss = model(images, labels=torch.randint(5, (2, 64, 128))).loss
    own = maps.method_losses()
    assert set(own) == {"ratio"}
    (loss + sum(own.values())).backward()
    assert all(p.grad is not None for p in maps.reducer.parameters())
    with pytest.raises(ValueError, match="multiples of .* pixels, got 64 x 100"):
        model(torch.randn(1, 3, 64, 100))


def test_upernet_on_blocks_of_a_vit() -> None:
    maps = as_backbone(randomise(vit()).eval())
    assert maps.indices == (0, 1, 2, 3) and maps.channels == [48] * 4 and not maps.training
    model = uper(maps.channels)
    model.backbone = maps
    with torch.no_grad():
        assert model(torch.randn(1, 3, 48, 48)).logits.shape == (1, 5, 48, 48)
    with pytest.raises(ValueError, match="losses need a pass in training mode first"):
        maps.method_losses()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="has ResNetBackbone as its backbone, but methods run on"):
        reduce_backbone(uper([8, 8, 8, 8]), "tome(r=2)")
    with pytest.raises(ValueError, match="the embedding before its first block"):
        reduce_backbone(dpt(out_features=["stem", "stage1", "stage2", "stage3"]), "tome(r=2)")
    for indices, words in (([3, 1], "ascending"), ([4], r"0\.\.3, got 4"), ([], "ascending")):
        with pytest.raises(ValueError, match=words):
            as_backbone(vit(), indices)
    with pytest.raises(ValueError, match="leave them out for a dense backbone"):
        as_backbone(pyramid(vit()), [1])
