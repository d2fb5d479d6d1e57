"""Batches: their order, and that workers and ranks change nothing in it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from samples import PLAIN, Numbers, evaluation, same, seen, train

from foveate.data import (
    Augment,
    Loader,
    Source,
    device_batches,
    eval_transform,
    fashion_mnist_mini,
    limited,
    normalise,
    open_source,
    train_transform,
)
from foveate.data.fashion import MEAN, STD

# Order -------------------------------------------------------------------------------------------


def test_what_a_batch_holds() -> None:
    batch = next(iter(train(transform=PLAIN)))
    assert batch["image"].shape == (6, 1, 4, 4) and batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()
    assert batch["label"].tolist() == [i // 10 for i in batch["index"].tolist()]
    assert batch["unreadable"] == []
    assert set(next(iter(train(Numbers(classes=None))))) == {"image", "index", "unreadable"}


def test_an_epoch_is_a_permutation_and_drops_what_is_not_a_batch() -> None:
    loader = train()
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 6
    for epoch in (first, second):
        assert len(set(seen(epoch))) == 36
    assert seen(first) != seen(second) and seen(first) != sorted(seen(first))
    assert seen(list(train(seed=4))) != seen(first)
    # Frozen: a run of today must be resumable with a later version.
    assert seen(first)[:6] == FIRST_SIX


FIRST_SIX = [37, 9, 25, 28, 12, 7]


def test_evaluation_is_in_order_and_complete() -> None:
    loader = evaluation()
    for _ in range(2):
        batches = list(loader)
        assert [len(b["index"]) for b in batches] == [6] * 6 + [4] and len(loader) == 7
        assert seen(batches) == list(range(40))


def test_the_epoch_and_the_seed_change_the_augmentation() -> None:
    def pictures(loader: Loader) -> dict[int, bytes]:
        return {
            i: image.numpy().tobytes()
            for batch in loader
            for i, image in zip(batch["index"].tolist(), batch["image"], strict=True)
        }

    loader = train()
    runs = [pictures(loader), pictures(loader), pictures(train(seed=4)), pictures(train())]
    assert runs[0] == runs[3]
    for other in runs[1:3]:
        common = [i for i in runs[0] if i in other and i > 0]
        assert sum(runs[0][i] != other[i] for i in common) > len(common) / 2


def test_repeats() -> None:
    source = Numbers(count=40)
    loader = train(source, repeats=3, batch=10)
    batches = list(loader)
    assert len(batches) == 4  # an epoch is as long as ever
    counts = Counter(seen(batches))
    assert sorted(counts.values()) == [1] + [3] * 13
    order = seen(batches)
    assert order[0] == order[1] == order[2] and order[3] == order[4] == order[5]
    images = torch.cat([b["image"] for b in batches])
    differing = sum(not torch.equal(images[i], images[i + 1]) for i in range(0, 36, 3))
    assert differing > 6


# Workers and ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("auto", [None, "rand-m9-mstd0.5-inc1"])
def test_workers_change_nothing(workers: int, auto: str | None) -> None:
    transform = train_transform(Augment(auto=auto), (4, 4), 1)
    source = Numbers(broken=frozenset({2, 3, 17}))
    alone, helped = (train(source, transform, workers=n) for n in (0, workers))
    for _ in range(2):
        assert same(list(alone), list(helped))
    assert alone.unreadable == helped.unreadable and len(alone.unreadable) == 3
    alone, helped = (evaluation(source, workers=n) for n in (0, workers))
    assert same(list(alone), list(helped))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_the_process_are_left_alone(workers: int) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    transform = train_transform(Augment(auto="rand-m9-mstd0.5-inc1"), (4, 4), 1)
    list(train(transform=transform, workers=workers))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("repeats", [1, 2])
def test_ranks_see_what_one_process_sees(repeats: int) -> None:
    one = list(train(batch=12, repeats=repeats))
    ranks = [list(train(batch=4, rank=rank, world=3, repeats=repeats)) for rank in range(3)]
    assert [len(r) for r in ranks] == [len(one)] * 3
    for number, whole in enumerate(one):
        for key in ("image", "label", "index"):
            joined = torch.cat([ranks[rank][number][key] for rank in range(3)])
            assert torch.equal(joined, whole[key])


@pytest.mark.parametrize("count", [40, 41, 42, 2])
def test_ranks_evaluate_every_image_once(count: int) -> None:
    loaders = [evaluation(Numbers(count), rank=rank, world=3, batch=5) for rank in range(3)]
    shares = [seen(list(loader)) for loader in loaders]
    assert sorted(sum(shares, [])) == list(range(count))
    assert shares[1] == list(range(1, count, 3))
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]


# Limits ------------------------------------------------------------------------------------------


def some(most: int, balanced: bool = True, **options: Any) -> Source:
    return limited(Numbers(**options), most, balanced=balanced)


def test_a_limit_in_training_takes_some_of_every_class() -> None:
    source = some(42, count=400, per_class=100)
    loader = train(source, batch=42)
    (batch,) = loader
    assert sorted(Counter(batch["label"].tolist()).values()) == [10, 10, 11, 11]
    (again,) = loader
    assert set(seen([again])) == set(seen([batch]))
    chosen = sorted(batch["image"][:, 0, 0, 0].tolist())
    assert [source.name(i) for i in range(42)] == [
        source.name(i) for i in range(len(some(42, count=400, per_class=100)))
    ]
    assert len(set(seen([batch]))) == 42 and len(chosen) == 42
    names = [int(source.name(i).split()[1]) for i in range(42)]
    assert names == sorted(names) and names[-1] - names[0] > 300


def test_a_limit_beyond_a_small_class_takes_all_of_it() -> None:
    (batch,) = train(some(20, count=32), batch=20)
    assert Counter(batch["label"].tolist()) == {0: 6, 1: 6, 2: 6, 3: 2}
    (unlabelled,) = train(some(20, classes=None), batch=20)
    assert len(set(seen([unlabelled]))) == 20
    whole = Numbers()
    assert limited(whole, 100, balanced=True) is whole is limited(whole, None, balanced=False)


def test_a_limit_in_evaluation_is_evenly_spaced() -> None:
    for count, wanted in ((8, list(range(0, 40, 5))), (7, [i * 40 // 7 for i in range(7)])):
        source = some(count, balanced=False)
        assert [source.name(i) for i in range(count)] == [f"number {i}" for i in wanted]
        assert [source.label(i) for i in range(count)] == [i // 10 for i in wanted]


def test_what_stands_in_is_within_the_limit() -> None:
    names = [some(10).name(i) for i in range(10)]
    broken = frozenset(int(name.split()[1]) for name in names[:4])
    (batch,) = train(some(10, broken=broken), batch=10)
    assert set(seen([batch])) == set(range(4, 10))


# The rest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 41}, "a batch of 41 is larger than the training data, which have 40 images"),
        (
            {"batch": 21, "world": 2},
            "a batch of 21 on each of 2 processes is larger than",
        ),
        ({"batch": 0}, "batch must be a whole number from 1, got 0"),
        ({"batch": 2.0}, r"batch must be a whole number from 1, got 2\.0"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"workers": -1}, "workers must be a whole number from 0"),
        ({"repeats": 0}, "repeats must be a whole number from 1"),
        ({"repeats": 2, "train": False}, "repeats is for training; evaluation takes 1, got 2"),
        ({"rank": 2, "world": 2}, r"rank must lie in 0\.\.1 for 2 processes, got 2"),
        ({"corrupt": "ignore"}, "corrupt must be one of 'skip', 'fail'; got 'ignore'"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_evaluation_takes_a_batch_above_the_data() -> None:
    assert seen(list(evaluation(batch=100))) == list(range(40))


def test_device_batches() -> None:
    source = open_source("fashion-mnist", "test")
    loader = Loader(source, eval_transform((28, 28), 1), batch=300, train=False)
    whole = fashion_mnist_mini("test")
    found = list(device_batches(loader, (MEAN,), (STD,), "cpu"))
    assert torch.equal(torch.cat([images for images, _, _ in found]), normalise(whole.images))
    assert torch.equal(torch.cat([labels for _, labels, _ in found]), whole.labels)
    assert torch.equal(torch.cat([index for _, _, index in found]), torch.arange(2000))
    for arguments, message in (
        (((0.5,), (0.5, 0.5)), "mean and std need a value each per channel"),
        (((0.5,) * 3, (0.5,) * 3), "is of 3 channels; the images have 1"),
    ):
        with pytest.raises(ValueError, match=message):
            next(device_batches(loader, *arguments, "cpu"))
