"""Losses between logits, labels, a teacher and final tokens; each is a mean over images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    *("distillation", "feature_distance", "hard_distillation", "of_a_process"),
    *("ratio_loss", "token_distillation"),
]

_TINY = torch.finfo(torch.float32).tiny


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the KL divergence from the teacher's class probabilities, times T squared.

    It is a sum over classes and a mean over images. Dividing by the number of classes too, as one
    release does, makes it a thousand times weaker on ImageNet.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    wanted = (teacher.float() / temperature).log_softmax(-1)
    return F.kl_div(student, wanted, log_target=True, reduction="batchmean") * temperature**2


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Compute the cross entropy with the teacher's decision as the label."""
    return F.cross_entropy(logits.float(), teacher.argmax(-1))


def token_distillation(tokens: Tensor, teacher: Tensor, kept: Tensor, how: str = "mse") -> Tensor:
    """Compute the distance of the kept final tokens from the teacher's.

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
    # If no token was kept, the sum is zero and must not be divided by zero.
    return (each * weight).sum() / of_a_process(weight.sum()).clamp_min(_TINY)


def feature_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """Average one minus the cosine of features ``[B, N, C]`` with a teacher's over all tokens."""
    return 1 - F.cosine_similarity(features.float(), teacher.float(), dim=-1).mean()


def of_a_process(count: Tensor) -> Tensor:
    """Average a count over all processes, so that losses average to the mean over all counted."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    whole = count.clone()
    torch.distributed.all_reduce(whole)
    return whole / torch.distributed.get_world_size()


def ratio_loss(
    shares: Mapping[int, Tensor], target: Callable[[int], float], per_image: bool
) -> dict[str, Tensor]:
    """Average over stages the squared distance between kept share and target.

    Args:
        shares: share that each image kept, ``[B]``, by stage; empty when no gate decided.
        target: gives the share that a stage should keep.
        per_image: hold every image to the target, not only the mean of the whole batch (over all
            processes that train together).
    """
    terms = [
        (((share if per_image else _over_ranks(share.mean())) - target(stage)) ** 2).mean()
        for stage, share in shares.items()
    ]
    return {"ratio": torch.stack(terms).mean()} if terms else {}


def _over_ranks(mean: Tensor) -> Tensor:
    """Average over all processes; data-parallel training averages the gradient correctly.

    Each process takes the outer factor of the square from the whole batch and the inner derivative
    from its own images. Their average is the gradient that a single process would compute.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mean
    whole = mean.detach().clone()
    torch.distributed.all_reduce(whole)
    whole /= torch.distributed.get_world_size()
    return mean + (whole - mean.detach())
