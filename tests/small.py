"""What tests outside the contract share: its small models, and token states made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from contract.table import close, eva, hf, images, randomise, said, vit
from torch import Tensor, nn

from foveate.core import BackboneSpec, Context, Layout, ReducedViT, Reducer, TokenState
from foveate.registry import parse

__all__ = [
    "Said",
    "after_attention",
    "batch_state",
    "built",
    "close",
    "eva",
    "hf",
    "images",
    "keep_masks",
    "logits",
    "noise",
    "randomise",
    "said",
    "spec",
    "vit",
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_state(counts: Sequence[int] | int, *, prefix: int = 1, width: int = 4) -> TokenState:
    """Random tokens of a batch: patches per image, ragged when they differ or come as a list.

    ``counts`` as a number gives two images, even.
    """
    even = isinstance(counts, int)
    lengths = [counts + prefix] * 2 if even else [n + prefix for n in counts]
    layout = Layout.even(2, lengths[0]) if even else Layout.ragged(lengths)
    context = Context(prefix, (1, max(lengths) - prefix))
    return TokenState(noise(sum(lengths), width), layout, context)


def keep_masks(batch: int, grid: tuple[int, int], share: float = 0.6, seed: int = 5) -> Tensor:
    """Patches that take part, different in every image and never none."""
    drawn = torch.rand(batch, *grid, generator=torch.Generator().manual_seed(seed)) < share
    drawn[:, 0, 0] = True
    return drawn


def logits(model: ReducedViT, x: Tensor, **options: object) -> Tensor:
    """A forward pass without gradients."""
    with torch.no_grad():
        return said(model, x, **options)


def spec(**changes: object) -> BackboneSpec:
    """The facts of DeiT-S, with changes: for methods that are built without a model."""
    facts: dict = dict(
        family="test",
        width=384,
        depth=12,
        heads=6,
        head_dim=64,
        prefix=1,
        class_token=True,
        patch=(16, 16),
        grid=(14, 14),
        classes=1000,
        rotary=False,
        pools_patches=False,
        qkv_cost=(4 * 384 * 384,) * 12,
        mlp_cost=(8 * 384 * 384,) * 12,
        embed_cost=768 * 384,
        head_cost=384 * 1000,
    )
    return BackboneSpec(**{**facts, **changes})


class Said:
    """Stands in for what a method reads off attention: the values that a test wants it to see."""

    def __init__(self, row: Tensor, length: Tensor | None = None) -> None:
        """``row`` and ``length`` are ``[B, H, N]``, prefix included."""
        self.row, self.length = row, length

    def cls_row(self) -> Tensor:
        return self.row.mean(1)

    def cls_row_heads(self) -> Tensor:
        return self.row

    def value_norm(self) -> Tensor:
        assert self.length is not None
        return self.length


def built(method: str, **facts: object) -> Reducer:
    """A method, built without a model: by default for 4 blocks, 1 class token and a 1 x N grid."""
    reducer = parse(method)
    reducer.build(spec(**{"depth": 4, "width": 48, "heads": 3, **facts}))
    return reducer


def after_attention(model: nn.Module, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What timm's own block makes of tokens ``[B, N, C]``: their sum with its attention output,
    and the attention map ``[B, H, N, N]`` by the textbook."""
    stock = model.blocks[block]
    y = stock.norm1(x)
    q, k, _ = (
        part.unflatten(-1, (stock.attn.num_heads, -1)).transpose(1, 2)
        for part in stock.attn.qkv(y).chunk(3, -1)
    )
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return x + stock.ls1(stock.attn(y)), weights
