"""Batches of images in an order that can be resumed at any image.

Two things make that possible. The order follows from the seed and the epoch, and the randomness in
an image from the seed, the epoch and the image, so that two numbers describe the state of a run.
And the state counts batches that were handed out, not those that workers have prepared.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveate.core.schedule import check_choice
from foveate.data.augment import Transform
from foveate.data.images import Unreadable
from foveate.data.seeds import seeded
from foveate.data.sources import ArraySource, Source

__all__ = [
    *("CORRUPT", "Collate", "Loader", "check_batch", "device_batches", "listed", "stacked"),
    "usual_workers",
]

_log = logging.getLogger(__name__)

CORRUPT = ("skip", "fail")
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
_MOST_IN_A_ROW = 1000  # unreadable neighbours: more than that and the disk is gone, not an image


class Loader:
    """Batches of a source; see the module for what makes it resumable.

    Iterating gives dictionaries: what ``collate`` makes of the samples, by default the keys of one
    sample with the values of all ("image" ``[B, C, H, W]``, "label" int64 ``[B]``); "index", int64
    ``[B]`` in the source; and "unreadable", names of images that could not be read. An iteration
    that reaches its end moves on to the next epoch; one that is broken off is begun again.

    Args:
        source: from ``open_source``.
        transform: from a sample to a sample, such as ``train_transform`` gives.
        collate: from a list of samples to a batch.
        batch: images a batch, on each rank.
        seed: of order and augmentation.
        train: shuffle, and drop the last batch if it is not full; else all images in order.
        workers: processes that read; the batches are the same with any number. They stay from one
            epoch to the next.
        repeats: how often an image comes in a row, augmented differently each time. An epoch has as
            many images as ever, so it sees fewer different ones.
        rank: number of this process. Training ranks share each batch of ``batch * world``, so that
            all of them see what one process sees with that batch; in evaluation they take turns
            image by image, and nothing is seen twice.
        world: number of processes.
        corrupt: "skip" takes the next readable image in place of one that is not, and in evaluation
            leaves it out; "fail" raises.
        pinned: let workers hand batches out in memory that a GPU reads by itself.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch: int,
        collate: Collate | None = None,
        seed: int = 0,
        train: bool = True,
        workers: int = 0,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        corrupt: str = "skip",
        pinned: bool = False,
    ) -> None:
        _check_whole("batch", batch, 1)
        _check_whole("seed", seed, 0)
        _check_whole("workers", workers, 0)
        _check_whole("repeats", repeats, 1)
        _check_whole("world", world, 1)
        _check_whole("rank", rank, 0)
        if rank >= world:
            raise ValueError(f"rank must lie in 0..{world - 1} for {world} processes, got {rank}")
        check_choice("corrupt", corrupt, CORRUPT)
        if repeats > 1 and not train:
            raise ValueError(f"repeats is for training; evaluation takes 1, got {repeats}")
        self.source, self.transform = source, transform
        self.batch, self.train, self.workers, self.repeats = batch, train, workers, repeats
        self.seed, self.rank, self.world = seed, rank, world
        self.unreadable: dict[str, str] = {}
        if train:
            check_batch(batch, len(source), world)
        self._read = _Reader(source, transform, collate or stacked, seed, train, corrupt)
        self._plans = _Plans()
        self._helped: DataLoader | None = None
        self.pinned = pinned
        self._epoch = self._handed_out = 0
        self._start = 0  # where an iteration of this epoch begins

    @property
    def epoch(self) -> int:
        """Return the current epoch, or the next one if that is over."""
        return self._epoch + (self._handed_out == len(self) > 0)

    @property
    def images(self) -> int:
        """Return the number of images of the source, for all ranks."""
        return len(self.source)

    def __len__(self) -> int:
        """Return the number of batches in an epoch, on this rank."""
        images = self.images
        if self.train:
            return images // (self.batch * self.world)
        return math.ceil(len(range(self.rank, images, self.world)) / self.batch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; in the current one, stay at the present batch."""
        _check_whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self._go(epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Return the state: the epoch, and how many of its batches were handed out."""
        over = self.epoch > self._epoch
        return {"epoch": self.epoch, "batches": 0 if over else self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where a state was taken."""
        if not {"epoch", "batches"} <= set(state):
            raise ValueError(f"the state of a loader has epoch and batches, got {sorted(state)}")
        epoch, batches = state["epoch"], state["batches"]
        _check_whole("epoch", epoch, 0)
        _check_whole("batches", batches, 0)
        if batches > len(self):
            raise ValueError(
                f"the state says {batches} batches were handed out, but an epoch has {len(self)}: "
                "it is of other data or another batch size"
            )
        self._go(epoch, batches)

    def _go(self, epoch: int, batches: int) -> None:
        self._epoch, self._handed_out, self._start = epoch, batches, batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.epoch > self._epoch:  # the iteration before took all batches, but did not ask on
            self._go(self.epoch, 0)
        self._handed_out = start = self._start
        seen = 0
        for made in self._made(self._plan(start)):
            self._note(made["unreadable"])
            self._handed_out += 1
            seen += len(made["index"])
            if len(made["index"]):
                yield {**made, "unreadable": list(made["unreadable"])}
        if not seen and start < len(self):
            reason = next(iter(self.unreadable.values()))
            raise ValueError(f"none of the images is readable: {reason} ...")
        self._go(self._epoch + 1, 0)

    def _note(self, unreadable: dict[str, str]) -> None:
        for name, reason in unreadable.items():
            if name not in self.unreadable:
                self.unreadable[name] = reason
                _log.warning("skipped %s", reason)

    def _plan(self, start: int) -> list[_Task]:
        """Return the content of each batch of this epoch, from the given one on."""
        images, batch = self.images, self.batch
        if not self.train:
            share = np.arange(self.rank, images, self.world)
            parts = [share[i * batch : (i + 1) * batch] for i in range(start, len(self))]
            # Whatever is random in a data set's own transform is the same in every evaluation.
            return [_Task(0, part, np.zeros_like(part)) for part in parts]
        # This generator of numpy is frozen: the order is the same with every version of it.
        stream = np.random.MT19937(np.random.SeedSequence([self.seed, self._epoch]))
        order = np.random.RandomState(stream).permutation(images)
        order = order[: math.ceil(images / self.repeats)].repeat(self.repeats)
        repeat = np.arange(len(order)) % self.repeats
        firsts = [(number * self.world + self.rank) * batch for number in range(start, len(self))]
        return [
            _Task(self._epoch, order[first : first + batch], repeat[first : first + batch])
            for first in firsts
        ]

    def _made(self, plan: list[_Task]) -> Iterator[dict[str, Any]]:
        if not self.workers:
            yield from map(self._read.batch, plan)
            return
        if self._helped is None:
            self._helped = DataLoader(
                self._read,
                sampler=self._plans,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.workers,
                persistent_workers=True,
                pin_memory=self.pinned,
                # Else it would draw from the generator that the model draws from.
                generator=torch.Generator(),
            )
        self._plans.tasks = plan
        try:
            for made in self._helped:
                if isinstance(made, str):
                    raise ValueError(made)
                yield made
        except RuntimeError as error:  # how torch says that a process was killed
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"a worker that reads images has ended: {first}") from error


@dataclass
class _Plans:
    """The batches of the current epoch; persistent workers ask for them in every epoch."""

    tasks: list[_Task] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[_Task]:
        return iter(self.tasks)


@dataclass(frozen=True)
class _Task:
    """One batch: the numbers of its images, and which repeat of each."""

    epoch: int
    places: np.ndarray
    repeats: np.ndarray


@dataclass(frozen=True)
class _Reader(Dataset):
    """Make batches, in this process or in a worker."""

    source: Source
    transform: Transform
    collate: Collate
    seed: int
    train: bool
    corrupt: str

    def __getitem__(self, task: _Task) -> dict[str, Any] | str:
        """Make a batch in a worker; errors come back as a sentence, not a traceback."""
        try:
            return self.batch(task)
        except ValueError as error:
            return str(error)
        except Exception as error:
            return f"{_sentence(error)} (0 workers show where it comes from)"

    def batch(self, task: _Task) -> dict[str, Any]:
        """Make a batch; what was "unreadable" comes with the reasons."""
        samples: list[dict[str, Any]] = []
        index: list[int] = []
        unreadable: dict[str, str] = {}
        for place, repeat in zip(task.places.tolist(), task.repeats.tolist(), strict=True):
            # Of the place and not of what replaced it, which may come in the same batch itself.
            with seeded((self.seed, task.epoch, place, repeat)):
                found = self._readable(place, unreadable)
                if found is not None:
                    index.append(found[0])
                    samples.append(self._transformed(*found))
        made = self.collate(samples) if samples else {}
        return {
            **made,
            "index": torch.tensor(index, dtype=torch.int64),
            "unreadable": unreadable,
        }

    def _readable(
        self, place: int, unreadable: dict[str, str]
    ) -> tuple[int, dict[str, Any]] | None:
        """Return number and sample at a place; training takes the next place with a readable image.

        Images that were unreadable are tried again, because a resumed run does not know of them.
        """
        tries = min(len(self.source), _MOST_IN_A_ROW) if self.train else 1
        reasons = []
        for step in range(tries):
            index = (place + step) % len(self.source)
            try:
                return index, self.source.sample(index)
            except Unreadable as error:
                if self.corrupt == "fail":
                    raise
                reasons.append(str(error))
                unreadable[self.source.name(index)] = str(error)
        if self.train:
            which = f"{tries} images in a row" if tries < len(self.source) else "the images"
            raise ValueError(f"none of {which} is readable: {reasons[0]} ...")
        return None

    def _transformed(self, index: int, sample: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.transform(sample)
        except Exception as error:  # of Pillow, timm or torchvision: they do not know the name
            name = self.source.name(index)
            raise ValueError(f"{name} cannot be transformed: {_sentence(error)}") from error


def stacked(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch with the keys of one sample: stacked tensors, numbers in a tensor, or lists."""
    found: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, Tensor):
            found[key] = torch.stack(values).as_subclass(Tensor)
        elif isinstance(first, (int, float)):
            found[key] = torch.tensor(values)
        else:
            found[key] = values
    return found


def listed(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of images that differ in size: "image", a list, and "targets", another.

    A target is a dictionary of what belongs to an image, as plain tensors. Nothing is padded here.
    """
    plain = [
        {k: v.as_subclass(Tensor) if isinstance(v, Tensor) else v for k, v in sample.items()}
        for sample in samples
    ]
    return {"image": [sample.pop("image") for sample in plain], "targets": plain}


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _as_it_is(made: Any) -> Any:
    return made


def usual_workers(source: Source, processes: int = 1) -> int:
    """Return the default number of processes that read images.

    It is 0 for images in memory and without a GPU, where they would take the cores that the model
    computes on. With a GPU it is one for each core but one, up to 8.
    """
    if not torch.cuda.is_available() or isinstance(source, ArraySource):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, (cores or 1) // processes - 1))


def check_batch(batch: int, images: int, world: int = 1) -> None:
    """Refuse batches of ``world`` processes that the training images cannot fill."""
    if batch * world > images:
        on = f" on each of {world} processes" if world > 1 else ""
        raise ValueError(
            f"a batch of {batch}{on} is larger than the training data, which have {images} images; "
            "take a smaller batch"
        )


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")


def device_batches(
    loader: Iterable[dict[str, Any]],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Bring batches to a device: normalised images, labels, numbers of the images.

    Images that come as floating-point numbers are taken as normalised.

    Args:
        loader: a ``Loader``.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        device: what the model is on.
    """
    device = torch.device(device)
    if len(mean) != len(std):
        raise ValueError(f"mean and std need a value each per channel, got {mean!r} and {std!r}")
    shift, spread = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    for batch in loader:
        tensors = [batch["image"], batch["label"], batch["index"]]
        if tensors[0].shape[1] != len(mean):
            raise ValueError(
                f"mean {tuple(mean)!r} is of {len(mean)} channels; the images have "
                f"{tensors[0].shape[1]}"
            )
        if device.type == "cuda":  # bytes that are pinned travel while the device computes
            tensors = [tensor.pin_memory() for tensor in tensors]
        images, labels, index = (tensor.to(device, non_blocking=True) for tensor in tensors)
        if not images.is_floating_point():
            # Four times the bytes: made once, then changed in place.
            images = images.float().div_(255).sub_(shift).div_(spread)
        yield images, labels, index
