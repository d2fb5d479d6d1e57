"""ConMIM: a hidden patch must find itself among the patches of the whole image.

Yi et al., "Masked Image Modeling with Denoising Contrast", ICLR 2023. The student sees a masked
image and the teacher, a slow copy, all of the same crop in other colours. Both project tokens:
for each hidden patch the student's vector is compared with the teacher's of all patches of the
image, and should be nearest to that of its own place.

The released code normalises over the batch of each process, which ``sync_norm=False`` does; by
default it is over all processes, so that their number does not matter. It fine-tunes the teacher's
weights: runs leave them in teacher.safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from foveate.mim.encoders import TokenEncoder
from foveate.mim.masks import Hiding, Mask
from foveate.mim.method import Prediction, register
from foveate.mim.targets import gathered, patchify
from foveate.mim.teacher import TaughtModel, check_momentum

__all__ = ["ConMIM"]


@register("conmim")
class ConMIM(TokenEncoder, TaughtModel):
    """An encoder with mask tokens, and a contrast between the patches of one image.

    Args:
        vit: the encoder.
        projector_width: of the projector's two hidden layers.
        projector_out: width of the vectors that are compared.
        temperature: divides cosines.
        momentum: of the teacher at the start; it rises to 1 along a cosine.
        sync_norm: let the projector's batch norms use the tokens of all processes.
    """

    paper = "Yi et al., ICLR 2023"
    hiding = Hiding(kind="unit", ratio=0.75)
    fewest_hidden = 2
    teacher_trains = True

    def __init__(
        self,
        vit: nn.Module,
        projector_width: int = 4096,
        projector_out: int = 256,
        temperature: float = 0.1,
        momentum: float = 0.996,
        sync_norm: bool = True,
    ) -> None:
        super().__init__(vit)
        for name, value in (("projector_width", projector_width), ("projector_out", projector_out)):
            if value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        check_momentum(momentum)
        self.temperature, self.momentum = temperature, momentum
        wide, width = projector_width, self.backbone.spec.width
        batch_norm = BatchNorm if sync_norm else nn.BatchNorm1d
        self.projector = nn.Sequential(
            nn.Linear(width, wide, bias=False),
            batch_norm(wide),
            nn.ReLU(),
            nn.Linear(wide, wide, bias=False),
            batch_norm(wide),
            nn.ReLU(),
            nn.Linear(wide, projector_out, bias=False),
            batch_norm(projector_out, affine=False),
        )

    def forward(
        self, images: Tensor, mask: Mask, *, target: Tensor | None = None, states: bool = False
    ) -> Prediction:
        """Return the cross-entropy of finding hidden patches, "contrast"; see ``TaughtModel``."""
        tokens, kept = self.encode(images, mask, states)
        patches = self._project(tokens)
        target = self.target(images) if target is None else target
        logits = self._cosines(patches, target) / self.temperature  # [B, N, N]
        error = logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)
        loss = (error * mask.hidden).sum() / mask.hidden.sum()
        return Prediction({"contrast": loss}, patches, mask, kept)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Project all patches, ``[B, N, projector_out]``."""
        embedded = self.backbone.embed(images)
        tokens = self.backbone.through(embedded.x, embedded.grid)
        return self._project(self.backbone.norm(tokens))

    def _project(self, tokens: Tensor) -> Tensor:
        """Project all tokens, prefix included, and leave the prefix out."""
        found = self.projector(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)
        return found[:, self.backbone.spec.prefix :]

    def _cosines(self, rows: Tensor, columns: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            rows, columns = (F.normalize(x.float(), dim=-1) for x in (rows, columns))
            return rows @ columns.mT

    def momentum_at(self, progress: float, epochs: int) -> float:
        """Return half a cosine from the momentum to 1, update by update."""
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2

    def view(self) -> Callable[[Tensor], Tensor]:
        """Return a random change of colours, with occasional grey, blur or solarisation."""
        jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
        return v2.Compose(
            [
                v2.RandomApply([jitter], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.1),
                v2.RandomSolarize(threshold=128, p=0.2),
            ]
        )

    def pixels(self, images: Tensor, patches: Tensor) -> Tensor:
        """Return for each vector the patch of the image whose own vector is nearest."""
        nearest = self._cosines(patches, self.target(images)).argmax(-1)
        return gathered(patchify(images, self.backbone.spec.patch), nearest)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all processes, which have equally many.

    torch's own ``SyncBatchNorm`` works only on GPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[rows, C]``."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        world, rows = dist.get_world_size(), len(x) * dist.get_world_size()
        with torch.autocast(x.device.type, enabled=False):
            mean = _Sum.apply(x.float().mean(0)) / world
            centred = x.float() - mean
            variance = _Sum.apply(centred.square().mean(0)) / world
            found = centred * (variance + self.eps).rsqrt()
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        return found * self.weight + self.bias if self.affine else found


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, since each process has a loss of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found = gradient.contiguous().clone()
        dist.all_reduce(found)
        return found
