"""The table of the contract: every method with its options, every model form. One row each."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import foveate
from foveate.backbones import LVViT, MultiScaleViT, Scales
from foveate.core import ReducedViT

IMAGE = 48  # pixels; patch 8 gives a 6 x 6 grid
OTHER_SIZES = ((64, 64), (32, 72))


@dataclass(frozen=True)
class Row:
    """One method with options that make it act on the small models."""

    method: str
    modes: tuple[str, ...]  # modes that must agree, the reference first
    tolerance: float = 2e-5

    @property
    def name(self) -> str:
        return self.method.split("(")[0]


G, P, M = "gathered", "packed", "masked"

METHODS = (
    Row("ats(K=12)", (P, M)),
    Row("ats(K=9, variant='release', recall_before='head')", (P, M)),
    Row("atm(threshold=[0.2, 0.1], blocks=[0, 2], prop_attn=False, recall_before=2)", (P,)),
    Row("attention(keep=0.7)", (G, P)),
    Row("cropr(r=6)", (G, P)),
    Row("dynamicvit(keep=0.7)", (G, P, M)),
    Row("dynamicvit(keep=0.7, gate='argmax')", (P, M)),
    Row("evit(keep=0.7)", (G, P)),
    Row("evit(keep=0.6, rest='drop', blocks=[1, 2], recall_before=3)", (G, P)),
    Row("evovit(keep=0.5)", (G, P)),
    Row("evovit(keep=0.5, layerwise=True)", (G, P)),
    Row("evovit(keep=0.5, variant='deit')", (G, P)),
    Row("pitome(keep=0.9)", (G, P)),
    Row("pitome(keep=0.8, energy='elu', margin=0.75, unprotected=[0, 1])", (G, P)),
    Row("random(keep=0.7)", (G, P)),
    Row("spvit(keep=0.7)", (P, M)),
    Row("spvit(keep=0.6, package='sum', accumulate=True, shared_heads=True)", (P, M)),
    Row("spvit(keep=0.7, gate='topk', accumulate=True, recall_before='head')", (G, P, M)),
    Row("static(keep=0.7)", (G, P, M)),
    Row("structural", (G, P)),
    Row("svit(keep=0.7)", (P, M)),
    Row("svit(keep=0.7, gate='topk')", (G, P, M)),
    Row("svit(keep=0.7, reactivate=False, gate_prefix_last=True)", (P, M)),
    Row("svit(keep=0.7, reactivate=False, span=2, network='predictor')", (P, M)),
    Row("tokenmergence(keep=0.7)", (G, P)),
    Row("tokenmergence(keep=0.7, similarity='attention')", (G, P)),
    Row("tome(r=5)", (G, P)),
    Row("tome(r=4, inflection=-1.0, blocks=[1, 3], prop_attn=False, recall_before=2)", (G, P)),
    Row("dynamicvit(keep=0.6, blocks=[1], recall_before=2)", (G, P, M)),
    Row("random(keep=0.6, rest='merge')", (G, P)),
    Row("evit(keep=0.7, blocks=[1]) + tome(r=3, blocks=[2, 3])", (G, P)),
    Row("dynamicvit(keep=0.8, blocks=[2]) + svit(keep=0.7, blocks=[3])", (P, M)),
)


def vit(cls: type[nn.Module] = VisionTransformer, **options: object) -> nn.Module:
    """A small VisionTransformer."""
    base = dict(img_size=IMAGE, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    return cls(**{**base, **options})


def eva(**options: object) -> nn.Module:
    """A small Eva."""
    return vit(Eva, **options)


# Every form of the families; their prefixes are 0, 1, 2 and 5 tokens long.
FORMS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit_average": lambda: vit(global_pool="avg"),
    "vit_avgmax_prefix": lambda: vit(global_pool="avgmax", pool_include_prefix=True),
    "vit_qk_norm_max": lambda: vit(qk_norm=True, global_pool="max", scale_attn_norm=True),
    "deit_distilled": lambda: vit(VisionTransformerDistilled),
    "deit3": lambda: vit(no_embed_class=True, init_values=1e-6),
    "dinov2": lambda: vit(init_values=1e-5, num_classes=0),
    "dinov2_reg4": lambda: vit(
        init_values=1e-5, reg_tokens=4, no_embed_class=True, dynamic_img_size=True
    ),
    "clip": lambda: vit(pre_norm=True, act_layer="quick_gelu"),
    "siglip": lambda: vit(class_token=False, global_pool="map"),
    "siglip_average": lambda: vit(class_token=False, global_pool="avg", dynamic_img_size=True),
    "mae": lambda: vit(global_pool="avg", fc_norm=False),
    "lvvit": lambda: vit(LVViT),
    "multiscale": lambda: vit(MultiScaleViT, depth=6, scales=Scales(early=2)),
    "eva02": lambda: eva(
        use_rot_pos_emb=True,
        swiglu_mlp=True,
        scale_mlp=True,
        qkv_fused=False,
        ref_feat_shape=(4, 4),
        init_values=1e-5,
    ),
    "dinov3": lambda: eva(
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        num_reg_tokens=4,
        init_values=1e-5,
        dynamic_img_size=True,
        use_fc_norm=False,
        global_pool="avg",
    ),
    "rope_mixed": lambda: eva(
        use_rot_pos_emb=True,
        rope_type="mixed",
        no_embed_class=True,
        attn_type="rope",
        global_pool="token",
    ),
}
if "num_kv_heads" in inspect.signature(Eva).parameters:
    FORMS["eva_grouped"] = lambda: eva(
        use_rot_pos_emb=True, attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True
    )


def hf(name: str, **options: object) -> nn.Module:
    """A small model of transformers, by the name of its class."""
    import transformers

    kind = getattr(transformers, name)
    base = dict(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=IMAGE,
        patch_size=8,
        num_labels=10,
    )
    base["mlp_ratio" if "Dinov2" in name else "intermediate_size"] = 2 if "Dinov2" in name else 96
    return kind(kind.config_class(**{**base, **options}))


HF_FORMS: dict[str, Callable[[], nn.Module]] = {
    "hf_vit": lambda: hf("ViTForImageClassification"),
    "hf_dinov2_reg4": lambda: hf("Dinov2WithRegistersForImageClassification"),
    "hf_siglip": lambda: hf("SiglipVisionModel"),
}
if importlib.util.find_spec("transformers"):
    FORMS.update(HF_FORMS)


def fitting(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """The size, or the next one of which a form can make patches."""
    step = 16 if name == "multiscale" else 8
    return tuple(-(-side // step) * step for side in size)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that matters: scales near 1, biases far from 0."""
    noise = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=noise).to(like)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" in name or "lambda" in name or (p.ndim == 1 and name.endswith("weight")):
                p.copy_(1 + 0.1 * normal(p))
            elif p.ndim == 1:
                p.copy_(0.1 * normal(p))
            elif name.endswith(("weight", "latent")):
                p.copy_(normal(p) * (p[0].numel() ** -0.5))
            elif "freqs" not in name:
                p.copy_(0.5 * normal(p))
    return model


@lru_cache
def form(name: str) -> nn.Module:
    """A model form with random parameters, shared by the tests: leave it as it is."""
    torch.manual_seed(0)
    return randomise(FORMS[name]()).eval()


def reduced(row: Row | str, name: str, model: nn.Module | None = None) -> ReducedViT:
    """A method on a form, its own parameters random too."""
    method = row if isinstance(row, str) else row.method
    model = form(name) if model is None else model
    reduced = foveate.apply(model, method, check=False)
    randomise(reduced.reducer, seed=1)
    return reduced.eval()


def images(batch: int = 3, size: tuple[int, int] = (IMAGE, IMAGE), seed: int = 0) -> Tensor:
    """Random images with some structure, so that patches differ in more than noise."""
    noise = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, size[0] // 8, size[1] // 8, generator=noise)
    fine = torch.randn(batch, 3, *size, generator=noise)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.5 * fine


def said(model: nn.Module, x: Tensor, **options: object) -> Tensor:
    """What a model answers: logits, or the field that stands for them where it has several."""
    output = model(x, **options)
    if isinstance(output, dict):
        return output["logits" if "logits" in output else "pooler_output"]
    return output[0] if isinstance(output, tuple) else output


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to rounding, relative to the size of the values."""
    assert a.shape == b.shape
    scale = b.detach().abs().max().clamp_min(1.0)
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() <= tolerance * scale, float((a - b).abs().max() / scale)


def compilations(model: nn.Module, sizes: tuple[int, ...]) -> int:
    """How often a model is compiled for batches of these sizes, which must answer as eager."""
    from torch._dynamo.testing import CompileCounterWithBackend  # a second that few need

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in sizes:
            close(said(compiled, images(size)), said(model, images(size)))
    return counter.frame_count
