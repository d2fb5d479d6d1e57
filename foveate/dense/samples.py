"""Which anchors and proposals a detector learns from, the same on however many processes.

torchvision draws them for the whole batch from the generator of the process, and averages losses
over what the process has drawn. Here each image can have a seed of its own, and losses are averaged
over what all processes have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.core.losses import of_a_process

__all__ = ["Samples", "over_processes", "sampled"]

_TINY = torch.finfo(torch.float32).tiny


class Samples:
    """Calls a sampler of torchvision for each image, and counts what it takes.

    Attributes:
        positives: number of objects' samples in the batch.
        all: number of samples in the batch.
    """

    positives: Tensor
    all: Tensor

    def __init__(self, sampler: Any, seeds: Sequence[int] | None) -> None:
        self._sampler, self._seeds = sampler, seeds

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return which of each image's labels are taken, as positives and as negatives."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        if self._seeds is None:
            found = self._sampler(labels)
        else:
            for own, seed in zip(labels, self._seeds, strict=True):
                with _seeded(seed, own.device):
                    drawn = self._sampler([own])
                for taken, (one,) in zip(found, drawn, strict=True):
                    taken.append(one)
        self.positives, negatives = (torch.cat(taken).sum() for taken in found)
        self.all = self.positives + negatives
        return found


@contextmanager
def sampled(network: Any, seeds: Sequence[int] | None) -> Iterator[Samples]:
    """Let the proposal network or the heads behind it sample by seeds, and count the samples."""
    before = network.fg_bg_sampler
    network.fg_bg_sampler = samples = Samples(before, seeds)
    try:
        yield samples
    finally:
        network.fg_bg_sampler = before


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators, and give that of the device its state back afterwards."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type):
        torch.manual_seed(seed)
        yield


def over_processes(
    losses: Mapping[str, Tensor], anchors: Samples, proposals: Samples
) -> dict[str, Tensor]:
    """Weigh torchvision's losses so that the mean over processes is that over all samples.

    Args:
        losses: means over the samples of this process, by torchvision's names.
        anchors: what the proposal network learns from.
        proposals: what the heads behind it learn from; masks are learnt from positives alone.
    """
    counts = torch.stack([anchors.all, proposals.all, proposals.positives]).float()
    of_anchors, of_boxes, of_masks = counts / of_a_process(counts).clamp_min(_TINY)
    shares = {
        **{"loss_objectness": of_anchors, "loss_rpn_box_reg": of_anchors},
        **{"loss_classifier": of_boxes, "loss_box_reg": of_boxes, "loss_mask": of_masks},
    }
    return {name: shares[name] * loss for name, loss in losses.items()}
