"""Measure layers: heterogeneity of hidden tokens, affinity maps, and the alarm for collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.mim.heterogeneity import Similarity, heterogeneity, visible_cosine
from foveate.mim.masks import Mask
from foveate.mim.method import MaskedImageModel, States
from foveate.mim.targets import gathered

__all__ = [
    "ALARM",
    "Layers",
    "affinity",
    "collapsing",
    "measure_images",
    "measure_layers",
    "tokens_of",
]

ALARM = 0.95  # mean cosine of visible tokens at the start above which they may be collapsing
_ROUNDING = 1e-4  # how far the same tokens' cosine may sink from one measurement to the next


@dataclass
class Layers:
    """Measurements of a network's layers, means over images; index 0 is before the first layer.

    Attributes:
        heterogeneity: normalised to [0, 1]; the first of tokens before positions were added.
        cosine: mean cosine between visible tokens.
    """

    heterogeneity: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)


def collapsing(cosine: float, before: float | None) -> bool:
    """Tell whether visible tokens are nearly the same, and not getting more different.

    Early in training patches resemble each other, so a value above the limit that falls is normal.
    """
    return cosine > ALARM and (before is None or cosine >= before - _ROUNDING)


@torch.no_grad()
def measure_layers(
    model: MaskedImageModel,
    images: Tensor,
    mask: Mask,
    similarity: Similarity | None = None,
    *,
    normalise: bool = True,
) -> list[Layers]:
    """Measure heterogeneity and collapse of every network with hidden and visible tokens."""
    found = []
    for network in model(images, mask, states=True).states:
        levels, cosines = measure_images(network, mask, similarity, normalise=normalise)
        found.append(Layers(levels.mean(1).tolist(), cosines.mean(1).tolist()))
    return found


def tokens_of(network: States) -> Sequence[Tensor]:
    """Return the tokens to measure: before positions were added, then after every block."""
    return (network.initial, *network.tokens[1:])


@torch.no_grad()
def measure_images(
    network: States, mask: Mask, similarity: Similarity | None = None, *, normalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Measure heterogeneity and the visible tokens' mean cosine, ``[L + 1, B]`` each."""
    kind = similarity or Similarity()
    levels, cosines = [], []
    for tokens in tokens_of(network):
        levels.append(heterogeneity(tokens, mask, kind, normalise=normalise))
        cosines.append(visible_cosine(tokens, mask))
    return torch.stack(levels), torch.stack(cosines)


@torch.no_grad()
def affinity(tokens: Tensor, mask: Mask, similarity: Similarity | None = None) -> Tensor:
    """Return the softmax of each token's similarities to all, hidden first, ``[B, N, N]``.

    Rows and columns are sorted, so that a map has four quadrants: hidden to hidden and to visible
    above, visible to hidden and to visible below.
    """
    if mask.visible is None or mask.masked is None:
        raise ValueError("affinity maps need masks that hide as many patches in every image")
    order = torch.cat([mask.masked.sort(1).values, mask.visible.sort(1).values], 1)
    sorted_tokens = gathered(tokens, order)
    return (similarity or Similarity())(sorted_tokens).softmax(-1)
