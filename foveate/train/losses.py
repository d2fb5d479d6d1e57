"""Losses between logits, labels, a teacher and final tokens; each a mean over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation", "hard_distillation", "token_distillation"]

_TINY = torch.finfo(torch.float32).tiny


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence from the teacher's class probabilities, times the squared temperature.

    A sum over classes and a mean over images: dividing by the number of classes too, as one release
    does, makes it a thousand times weaker on ImageNet.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    wanted = (teacher.float() / temperature).log_softmax(-1)
    return F.kl_div(student, wanted, log_target=True, reduction="batchmean") * temperature**2


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy with the teacher's decision as the label."""
    return F.cross_entropy(logits.float(), teacher.argmax(-1))


def token_distillation(tokens: Tensor, teacher: Tensor, kept: Tensor, how: str = "mse") -> Tensor:
    """Distance of the kept final tokens from the teacher's.

    Args:
        tokens: ``[B, N, C]``.
        teacher: ``[B, N, C]``.
        kept: tokens that count, ``[B, N]``; no gradient goes through it.
        how: "mse", the mean square over channels, or "kl" between softmaxes over channels.
    """
    weight = kept.detach().float()
    if how == "mse":
        each = (tokens.float() - teacher.float()).square().mean(-1)
    else:
        student, wanted = tokens.float().log_softmax(-1), teacher.float().log_softmax(-1)
        each = F.kl_div(student, wanted, log_target=True, reduction="none").sum(-1)
    # Where no token at all was kept there is nothing to compare, and no division by zero.
    return (each * weight).sum() / _of_a_process(weight.sum()).clamp_min(_TINY)


def _of_a_process(count: Tensor) -> Tensor:
    """A count's mean over all processes: what they average is then the mean over all tokens."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    whole = count.clone()
    torch.distributed.all_reduce(whole)
    return whole / torch.distributed.get_world_size()
