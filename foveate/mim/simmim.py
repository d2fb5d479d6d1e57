"""SimMIM: hidden patches are replaced by a learned token, and one linear layer predicts pixels.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022.
"""

from __future__ import annotations

from torch import Tensor, nn

from foveate.mim.encoders import TokenEncoder
from foveate.mim.masks import Hiding, Mask
from foveate.mim.method import Prediction, register
from foveate.mim.targets import patchify

__all__ = ["Simmim"]


@register("simmim")
class Simmim(TokenEncoder):
    """Mask tokens in the encoder, and one linear layer from its tokens to pixels.

    Args:
        vit: the encoder.
    """

    paper = "Xie et al., CVPR 2022"
    hiding = Hiding(kind="unit", ratio=0.6)

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.head = nn.Linear(self.backbone.spec.width, self.values)

    def forward(self, images: Tensor, mask: Mask, *, states: bool = False) -> Prediction:
        """Return the mean absolute error over the pixels of hidden patches, under "pixel"."""
        backbone = self.backbone
        tokens, kept = self.encode(images, mask, states)
        patches = self.head(tokens[:, backbone.spec.prefix :])
        error = (patches.float() - patchify(images, backbone.spec.patch)).abs().sum(-1)
        channels = backbone.channels
        # Pixels, with the release's hair against a mask that hides nothing.
        hidden = mask.hidden.sum() * (self.values // channels) + 1e-5
        loss = (error * mask.hidden).sum() / hidden / channels
        return Prediction({"pixel": loss}, patches, mask, kept)
