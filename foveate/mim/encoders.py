"""The two ways to hide patches from the encoder: leave them out, or replace them by a token."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from foveate.mim.masks import Mask
from foveate.mim.method import MaskedImageModel, States
from foveate.mim.targets import gathered

__all__ = ["TokenEncoder", "VisibleEncoder", "sincos_positions"]

_STD = 0.02


class VisibleEncoder(MaskedImageModel):
    """An encoder that computes only visible patches, which needs absolute positions.

    Args:
        vit: the encoder.
        learned_positions: train its positions; those of the papers are sines and cosines, and stay.

    Attributes:
        token_std: spread of new class and register tokens.
    """

    token_std: ClassVar[float] = _STD

    def __init__(self, vit: nn.Module, *, learned_positions: bool) -> None:
        super().__init__(vit)
        if self.backbone.model.pos_embed is None or self.backbone.needs_every_token:
            raise ValueError(
                f"{self.name} leaves patches out, which needs absolute positions: this "
                f"{self.backbone.spec.family} has none; simmim and conmim take it"
            )
        self.backbone.model.pos_embed.requires_grad_(learned_positions)

    def visible(self, images: Tensor, mask: Mask) -> Tensor:
        """Embed images; gives the prefix and the visible patches ``[B, prefix + V, C]``."""
        if mask.visible is None:
            raise ValueError(f"{self.name} needs masks that hide as many patches in every image")
        prefix = self.backbone.spec.prefix
        x = self.backbone.embed(images).x
        return torch.cat([x[:, :prefix], gathered(x[:, prefix:], mask.visible)], 1)

    def initialise(self) -> None:
        """Draw weights by Xavier's rule, small prefix tokens, and sine-cosine positions."""
        _xavier(self)
        vit, spec = self.backbone.model, self.backbone.spec
        for name in ("cls_token", "dist_token", "reg_token"):
            if getattr(vit, name, None) is not None:
                nn.init.normal_(getattr(vit, name), std=self.token_std)
        for name, parameter in self.named_parameters():
            if name.endswith("mask_token"):
                nn.init.normal_(parameter, std=_STD)
        prefix = vit.pos_embed.shape[1] - spec.grid[0] * spec.grid[1]
        with torch.no_grad():
            vit.pos_embed.copy_(sincos_positions(spec.grid, spec.width, prefix))


class TokenEncoder(MaskedImageModel):
    """An encoder that computes all patches, with a learned token in place of each hidden one.

    Args:
        vit: timm's ``Beit`` with a shared relative position bias, as in the releases, or a
            ``VisionTransformer``, whose positions are added to mask tokens too.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.backbone.spec.width))

    @property
    def depth(self) -> int:
        """Return the number of blocks of the encoder."""
        return self.backbone.spec.depth

    def encode(self, images: Tensor, mask: Mask, states: bool) -> tuple[Tensor, tuple[States, ...]]:
        """Return all normed tokens ``[B, prefix + N, C]``, and the states if they are asked for."""
        grid = self._checked(images, mask)
        backbone, prefix = self.backbone, self.backbone.spec.prefix
        initial: list[Tensor] = []

        def replace(patches: Tensor) -> Tensor:
            token = self.mask_token.to(patches.dtype)
            initial.append(torch.where(mask.hidden[..., None], token, patches))
            return initial[0]

        x = backbone.embed(images, replace).x
        layers = [x]
        x = backbone.through(x, grid, layers.append if states else None)
        kept = States([layer[:, prefix:] for layer in layers], initial[0])
        return backbone.norm(x), (kept,) if states else ()

    def initialise(self) -> None:
        """Draw truncated normals of spread 0.02; outputs of blocks are scaled down with depth.

        ``nn.Linear`` layers beside the ViT are drawn in the same way.
        """
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                trunc_normal_(part.weight, std=_STD)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for name, parameter in self.vit.named_parameters():
            if name.endswith(("cls_token", "dist_token", "reg_token", "pos_embed")):
                trunc_normal_(parameter, std=_STD)
        trunc_normal_(self.mask_token, std=_STD, a=-_STD, b=_STD)
        with torch.no_grad():
            for number, block in enumerate(self.backbone.model.blocks, 1):
                for out in (block.attn.proj, block.mlp.fc2):
                    out.weight.div_(math.sqrt(2 * number))


def _xavier(module: nn.Module) -> None:
    """Draw weights as MAE does: linear layers, and the patch projection seen as one."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def sincos_positions(
    grid: tuple[int, int], width: int, prefix: int, device: torch.device | None = None
) -> Tensor:
    """Return sines and cosines of x in one half of the channels and of y in the other.

    ``[1, prefix + N, width]``; prefix tokens get zeros.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides, got {width}")
    quarter = width // 4
    rates = 10000 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    y, x = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij"
    )
    parts = []
    for place in (x, y):
        angle = place.reshape(-1, 1) * rates
        parts += [angle.sin(), angle.cos()]
    rows = torch.cat(parts, 1).float()
    return torch.cat([rows.new_zeros(prefix, width), rows])[None]
