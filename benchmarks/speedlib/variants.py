"""Models, images and methods of the benchmark. Nothing is downloaded.

Weights are random (speed does not depend on them) and images synthetic. Where a method lets every
image have its own count, random weights would decide arbitrarily, so:

* ``ats``: the query and key rows of every block from a quarter of the depth on are multiplied by 3,
  in a copy of the model that ats and its oracle share; attention of a random model is so flat
  that nearly every token would be kept;
* ``svit``, ``spvit``: the last layer of every gate is scaled so that the log-odds of keeping have
  unit spread, and its bias moved so that a calibration batch (other images) keeps exactly the
  gate's target share; the timed images then keep about that share, each its own count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

import foveate
from foveate.core import ReducedViT

__all__ = ["METHODS", "MODELS", "Method", "build_model", "natural_images", "reduced_model"]

MODELS = {
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "tiny": "tiny",
}
_CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: registry name.
        options: those that differ from the defaults.
        bars: which row of the goals applies.
        varies: whether each image has its own count (then nothing is compiled).
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    bars: str = "pruning"
    varies: bool = False


METHODS = {
    "evit": Method("evit"),
    "evit-nofuse": Method("evit", {"fuse": False}),
    "attention": Method("attention"),
    "dynamicvit": Method("dynamicvit"),
    "tokenmergence": Method("tokenmergence", bars="mergence"),
    "tome": Method("tome", {"r": 13}, bars="tome"),
    "svit-topk": Method("svit", {"gate": "topk"}),
    "ats": Method("ats", bars="varying", varies=True),
    "svit": Method("svit", {"gate": "argmax"}, bars="varying", varies=True),
    "spvit": Method("spvit", {"gate": "argmax"}, bars="varying", varies=True),
}


def build_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A stock timm model with seeded random weights, for inference."""
    torch.manual_seed(0)
    if name == "tiny":
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=64, patch_size=8, embed_dim=64, depth=12, num_heads=2, num_classes=10
        )
    else:
        model = timm.create_model(MODELS[name], pretrained=False)
    return model.eval().requires_grad_(False).to(device=device, dtype=dtype)


def natural_images(count: int, side: int, seed: int) -> Tensor:
    """Synthetic images with the statistics that matter here, ``[count, 3, side, side]`` float32.

    Noise whose amplitude falls as 1 / f**a, as that of photographs does; the exponent, the
    contrast and a smooth window that leaves part of the picture flat differ between images, so
    they differ in how much of them is worth a token. Deterministic in ``seed``.
    """
    noise = torch.Generator().manual_seed(seed)
    rows = torch.fft.fftfreq(side)[:, None]
    columns = torch.fft.rfftfreq(side)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / side)

    def field_of(channels: int, exponent: float) -> Tensor:
        white = torch.randn(channels, side, side, generator=noise)
        smooth = torch.fft.irfft2(torch.fft.rfft2(white) / frequency**exponent, s=(side, side))
        return (smooth - smooth.mean((1, 2), keepdim=True)) / smooth.std((1, 2), keepdim=True)

    images = []
    for _ in range(count):
        exponent, contrast, level = (
            low + (high - low) * float(torch.rand((), generator=noise))
            for low, high in ((0.7, 1.6), (0.4, 1.4), (-2.0, 1.0))
        )
        grey, colour = field_of(1, exponent), field_of(3, exponent)
        window = torch.sigmoid(6 * (field_of(1, 2.5) - level))
        images.append(contrast * window * (0.9 * grey + 0.4 * colour))
    return torch.stack(images)


def reduced_model(
    key: str, vit: nn.Module, sharpened: nn.Module | None, side: int, seed: int
) -> ReducedViT:
    """``METHODS[key]`` on ``vit``, with gates set to keep their target share."""
    method = METHODS[key]
    base = sharpened if method.name == "ats" and sharpened is not None else vit
    torch.manual_seed(seed)
    model = foveate.apply(base, method.name, **method.options).eval()
    model.requires_grad_(False)
    if method.varies and method.name != "ats":
        reference = next(vit.parameters())
        images = natural_images(_CALIBRATION_IMAGES, side, seed + 1)
        _calibrate(model, images.to(reference.device, reference.dtype))
    return model


def sharpen(vit: nn.Module, factor: float = 3.0) -> nn.Module:
    """A copy whose attention is less flat from a quarter of the depth on."""
    vit = copy.deepcopy(vit)
    for block in vit.blocks[len(vit.blocks) // 4 :]:
        qkv = block.attn.qkv
        rows = 2 * qkv.out_features // 3
        with torch.no_grad():
            qkv.weight[:rows] *= factor
            if qkv.bias is not None:
                qkv.bias[:rows] *= factor
    return vit


# Gates that keep what they should ----------------------------------------------------------------


@torch.no_grad()
def _calibrate(model: ReducedViT, images: Tensor) -> None:
    """Set every gate in one pass, each on the tokens that the gates before it leave."""
    setter = {"svit": _svit_gates, "spvit": _spvit_gates}[model.reducer.name]
    with setter(model):
        model(images)


@contextmanager
def _svit_gates(model: ReducedViT) -> Iterator[None]:
    reducer, prefix = model.reducer, model.backbone.spec.prefix

    def hook_of(stage: int) -> Any:
        def hook(gate: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            images = _CALIBRATION_IMAGES
            odds = (out[:, 0] - out[:, 1]).float().view(images, -1)[:, prefix:].flatten()
            _set(odds, reducer.target(stage) * odds.numel(), [gate[-1]])
            return nn.Sequential.forward(gate, inputs[0])

        return hook

    handles = [gate.register_forward_hook(hook_of(i)) for i, gate in enumerate(reducer.gates)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _spvit_gates(model: ReducedViT) -> Iterator[None]:
    reducer = model.reducer
    logits_of = reducer.logits

    def logits(stage: int, state: Any) -> Tensor:
        out, counted = logits_of(stage, state), reducer.candidates(state)
        present = state.present()
        counted = counted if present is None else counted & present
        odds = (out[..., 0] - out[..., 1]).float()[counted]
        wanted = reducer.schedule.share(stage) * state.patches * state.batch
        _set(odds, wanted, [reducer.selectors[stage].predictors.rest[-1]])
        return logits_of(stage, state)

    reducer.logits = logits
    try:
        yield
    finally:
        del reducer.logits


def _set(odds: Tensor, wanted: float, layers: list[nn.Module]) -> None:
    """Scale the layers that make log-odds to unit spread; move the bias so ``wanted`` are kept."""
    spread = float(odds.std().clamp_min(1e-6))
    dropped = min(max(round(odds.numel() - wanted), 0), odds.numel() - 1)
    threshold = float(odds.sort().values[dropped])
    for layer in layers:
        layer.weight /= spread
        layer.bias[..., 0] = (layer.bias[..., 0] - threshold) / spread
        layer.bias[..., 1] /= spread
