"""Models that cannot be driven are refused by name; those that only look strange are not."""

from __future__ import annotations

import pytest
import timm
import torch
from small import eva, images, logits, randomise, vit
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

import foveate
from foveate.backbones import FAMILIES, rebuild

SUPPORTED = "foveate supports plain pre-norm vision transformers with global attention"


def refused(model: nn.Module, *words: str) -> None:
    for check in (True, False):  # nothing needs to be run to see it
        with pytest.raises(ValueError) as error:
            foveate.apply(model, "evit", check=check)
        for word in (*words, SUPPORTED):
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("swinv2_tiny_window8_256", "SwinTransformerV2"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("vit_relpos_base_patch16_cls_224", "VisionTransformerRelPos"),
        ("vit_srelpos_small_patch16_224", "VisionTransformerRelPos"),
        ("resnet18", "ResNet"),
        ("convnext_tiny", "ConvNeXt"),
        ("mvitv2_tiny", "MultiScaleVit"),
        ("pvt_v2_b0", "PyramidVisionTransformerV2"),
        ("hiera_tiny_224", "Hiera"),
        ("cait_xxs24_224", "Cait"),
        ("samvit_base_patch16", "VisionTransformerSAM"),
        ("levit_128s", "LevitDistilled"),
    ],
)
def test_other_architectures(name: str, kind: str) -> None:
    with torch.device("meta"):
        refused(timm.create_model(name), kind, "not a plain ViT")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("eva02_enormous_patch14_clip_224", "post-norm blocks"),
        ("vit_dpwee_patch16_reg1_gap_256", "parallel blocks"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention attention"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed patch embedding"),
    ],
)
def test_named_models_of_the_two_families(name: str, word: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    with torch.device("meta"):
        refused(timm.create_model(name), word)


@pytest.mark.parametrize(
    ("block", "word"),
    [
        (ResPostBlock, "VisionTransformer with post-norm blocks"),
        (ParallelScalingBlock, "VisionTransformer with parallel blocks"),
        (ParallelThingsBlock, "VisionTransformer with parallel blocks"),
        (DiffParallelScalingBlock, "VisionTransformer with parallel blocks"),
    ],
)
def test_other_blocks(block: type[nn.Module], word: str) -> None:
    refused(vit(block_fn=block), word)


class OwnVit(VisionTransformer):
    """Whoever overrides may have changed anything."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward_features(x)


class OwnHead(VisionTransformer):
    """A class attribute that hides the submodule of that name."""

    norm = staticmethod(torch.tanh)


class Constructed(VisionTransformer):
    """Another constructor and a method that timm's has not change nothing of what is computed."""

    def __init__(self, width: int = 48, **arguments: object) -> None:
        super().__init__(**{**arguments, "embed_dim": width})
        self.note = "mine"

    def describe(self) -> str:
        return self.note


def changed(part: str) -> nn.Module:
    model = vit()
    module = model.blocks[2] if part == "block" else model.blocks[2].attn
    module.__class__ = type("Own", (type(module),), {})
    return model


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: eva(use_post_norm=True), "Eva with post-norm blocks"),
        (lambda: vit(global_pool="prr"), "'prr' pooling"),
        (lambda: vit(patch_drop_rate=0.5), "patch dropout"),
        (lambda: eva(patch_drop_rate=0.5), "patch dropout"),
        (lambda: vit(OwnVit), "OwnVit with a class of its own, which overrides forward_features"),
        (lambda: vit(OwnHead), "OwnHead with a class of its own, which overrides norm"),
        (lambda: changed("block"), "Own blocks"),
        (lambda: changed("attention"), "Own attention"),
        (lambda: nn.Sequential(vit()), "Sequential"),
        (lambda: nn.DataParallel(vit()), "DataParallel"),
        (lambda: nn.Identity(), "Identity"),
        (lambda: "vit", "str"),
    ],
    ids=range(12),
)
def test_everything_else_that_cannot_be_driven(model: object, word: str) -> None:
    refused(model(), word)


def test_a_reduced_model_is_refused_too() -> None:
    with pytest.raises(ValueError, match="has a method already"):
        foveate.apply(foveate.apply(vit(), "evit"), "evit")


@pytest.mark.parametrize(
    "model",
    [
        lambda: vit(Constructed),
        lambda: vit(final_norm=False),
        lambda: vit(pos_embed="none"),
        lambda: vit(drop_rate=0.2, pos_drop_rate=0.2, attn_drop_rate=0.2, proj_drop_rate=0.2),
        lambda: vit(norm_layer="rmsnorm"),
        lambda: vit(qkv_bias=False, proj_bias=False),
        lambda: vit(depth=5, num_heads=1, patch_size=(8, 4), img_size=(48, 24)),
        lambda: vit(in_chans=1),
        lambda: vit(dynamic_img_pad=True),
        lambda: vit(global_pool=""),
        lambda: eva(use_pre_transformer_norm=True, use_rot_pos_emb=True),
        lambda: eva(global_pool="map", attn_pool_num_heads=3),
        lambda: eva(scale_attn_inner=True, swiglu_mlp=True, use_rot_pos_emb=True),
        lambda: eva(use_rot_pos_emb=True, rope_grid_offset=0.5, rope_grid_indexing="xy"),
    ],
    ids=range(14),
)
def test_plain_models_in_unusual_clothes_are_driven(model: object) -> None:
    """The self-check passes, other methods run, and nothing changes where nothing is reduced."""
    plain = randomise(model()).eval()
    channels, (height, width) = plain.patch_embed.proj.in_channels, plain.patch_embed.img_size
    x = images(2, (48, 48))[:, :channels, :height, :width]
    driven = foveate.apply(plain, "random(keep=1.0)").eval()
    torch.testing.assert_close(logits(driven, x), plain(x).detach(), atol=1e-4, rtol=1e-4)
    for method in ("tome(r=2)", "svit(gate='topk')"):
        assert torch.isfinite(logits(foveate.apply(plain, method).eval(), x)).all()


def test_parametrised_and_hooked_projections_are_driven() -> None:
    """Inside a block, parts are called as modules: weight norms and adapters stay in force."""
    plain = randomise(vit()).eval()
    nn.utils.parametrizations.weight_norm(plain.blocks[1].attn.qkv)
    nn.utils.parametrizations.spectral_norm(plain.blocks[2].mlp.fc1)
    plain.blocks[0].attn.qkv.register_forward_hook(lambda _, __, output: output * 1.3)
    driven = foveate.apply(plain, "random(keep=1.0)").eval()
    torch.testing.assert_close(
        logits(driven, images()), plain(images()).detach(), atol=1e-4, rtol=1e-4
    )


def test_matching_follows_adapters_on_the_keys() -> None:
    """An adapter as a hook, and the same adapter folded into the weights, merge the same pairs."""
    plain, folded = randomise(vit()).eval(), randomise(vit()).eval()
    scale = 1 + 0.9 * torch.randn(144, generator=torch.Generator().manual_seed(3))
    plain.blocks[0].attn.qkv.register_forward_hook(lambda _, __, output: output * scale)
    with torch.no_grad():
        folded.blocks[0].attn.qkv.weight *= scale[:, None]
        folded.blocks[0].attn.qkv.bias *= scale
    first, second = (
        foveate.apply(model, "tome(r=6, blocks=[0])").eval().trace(images()).blocks[0].output.source
        for model in (plain, folded)
    )
    assert torch.equal(first, second)


def test_an_unknown_family_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="did you mean 'timm Eva'.* Legal: .*timm Beit") as raised:
        rebuild("timm Evaa", {})
    assert all(family.family in str(raised.value) for family in FAMILIES)
