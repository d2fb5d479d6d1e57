"""SimMIM: hidden patches are replaced by a learned token, and one linear layer predicts pixels.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022.
"""

from __future__ import annotations

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from foveate.mim.masks import Mask
from foveate.mim.method import MaskedImageModel, Prediction, States, register
from foveate.mim.targets import patchify

__all__ = ["Simmim"]

_STD = 0.02


@register("simmim")
class Simmim(MaskedImageModel):
    """Mask tokens in the encoder.

    Args:
        vit: timm's ``Beit`` with a shared relative position bias, as in the release, or a
            ``VisionTransformer``, whose positions are added to mask tokens too.
    """

    paper = "Xie et al., CVPR 2022"
    mask_kind = "unit"
    mask_ratio = 0.6

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        width = self.backbone.spec.width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, self.values)

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return self.backbone.spec.depth

    def forward(self, images: Tensor, mask: Mask, *, states: bool = False) -> Prediction:
        """Mean absolute error over the pixels of hidden patches, under "pixel"."""
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
        patches = self.head(backbone.norm(x)[:, prefix:])
        kept = States([layer[:, prefix:] for layer in layers], initial[0])
        error = (patches.float() - patchify(images, backbone.spec.patch)).abs().sum(-1)
        channels = backbone.channels
        # Pixels, with the release's hair against a mask that hides nothing.
        hidden = mask.hidden.sum() * (self.values // channels) + 1e-5
        loss = (error * mask.hidden).sum() / hidden / channels
        return Prediction({"pixel": loss}, patches, mask, (kept,) if states else ())

    def initialise(self) -> None:
        """Truncated normals of spread 0.02; what blocks add to the stream shrinks with depth."""
        for part in (*self.vit.modules(), self.head):
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
