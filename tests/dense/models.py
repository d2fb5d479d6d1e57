"""What the tests of dense models share: small models, images of different sizes, comparisons."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from small import close, noise, randomise, vit
from torch import Tensor, nn

import foveate
from foveate.dense import DenseBackbone, adapter, pyramid

# Every kind of disposal: parked, fused, parked with a stand-in, sampled, gated, merged.
METHODS = (
    "svit(keep=0.7)",
    "evit(keep=0.7)",
    "evovit(keep=0.5)",
    "ats(K=12)",
    "dynamicvit(keep=0.7)",
    "tome(r=5)",
    "tokenmergence(keep=0.7)",
)
SIZES = ((48, 48), (40, 64), (29, 50))  # patches of 8: 6 x 6, 5 x 8 and 4 x 7, the last one padded


def photos(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Images of different sizes."""
    return [noise(3, *size, seed=seed + n) for n, size in enumerate(sizes or SIZES)]


def reduced(method: str | None, model: nn.Module | None = None) -> nn.Module:
    """A small ViT with random parameters, with a method on it or without."""
    model = randomise(vit()).eval() if model is None else model
    if method is None:
        return model
    found = foveate.apply(model, method, check=False)
    randomise(found.reducer, seed=1)
    return found.eval()


def backbone(kind: str, method: str | None = None, **options: object) -> DenseBackbone:
    """A pyramid or an adapter on a small ViT, all of its parameters random."""
    body = reduced(method)
    if kind == "pyramid":
        made: DenseBackbone = pyramid(body, channels=16, **options)
    else:
        made = adapter(body, stem=8, **options)
    for number, child in enumerate(made.children()):
        if child is not made.body:
            randomise(child, seed=2 + number)
    torch.manual_seed(0)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if hasattr(module, "gamma"):
            nn.init.uniform_(module.gamma, 0.5, 1.0)
        if hasattr(module, "sampling_offsets"):
            nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    return made.eval()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Maps by name are equal up to rounding."""
    assert list(a) == list(b)
    for name in a:
        close(a[name], b[name], tolerance)


def corner(maps: Mapping[str, Tensor], number: int, like: Mapping[str, Tensor]) -> dict:
    """One image's maps cut out of a batch's, as large as those of the image alone."""
    return {
        name: values[number : number + 1, :, : like[name].shape[2], : like[name].shape[3]]
        for name, values in maps.items()
    }
