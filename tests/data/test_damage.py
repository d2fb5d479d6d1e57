"""Images that cannot be read, transforms that fail and workers that die."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from samples import PLAIN, Numbers, evaluation, seen, train

from foveate.data import Augment, Loader, open_source, train_transform
from foveate.data import loader as module


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_readable_image_stands_in(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = frozenset({5, 6, 39})
    loader = train(Numbers(broken=broken), PLAIN, batch=40, workers=workers)
    (batch,) = loader
    counts = Counter(batch["index"].tolist())
    assert counts == {**dict.fromkeys(set(range(40)) - broken, 1), 7: 3, 0: 2}
    assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()
    assert batch["label"].tolist() == [i // 10 for i in batch["index"].tolist()]
    assert set(batch["unreadable"]) == {f"number {i}" for i in broken}
    assert loader.unreadable == {f"number {i}": f"number {i}: torn" for i in broken}
    list(loader)
    assert caplog.text.count("skipped number 5: torn") == 1  # and not again in each epoch


def test_what_stands_in_looks_different() -> None:
    """The image and its stand-in are often neighbours in one batch."""
    source = Numbers(broken=frozenset({5}))
    (batch,) = train(source, train_transform(Augment(), (4, 4), 1), batch=40)
    draws: list[float] = []

    def record(sample: dict[str, Any]) -> dict[str, Any]:
        draws.append(torch.rand(()).item())
        return PLAIN(sample)

    (batch,) = train(source, record, batch=40)
    assert len(set(draws)) == 40 and batch["index"].tolist().count(6) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_unreadable_images_are_left_out(workers: int) -> None:
    broken = frozenset({1, *range(12, 18), 39})
    loader = evaluation(Numbers(broken=broken), workers=workers)
    batches = list(loader)
    assert seen(batches) == [i for i in range(40) if i not in broken]
    assert [len(b["index"]) for b in batches] == [5, 6, 6, 6, 6, 3]  # none is empty
    assert batches[0]["unreadable"] == ["number 1"] and len(loader.unreadable) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_unreadable_image_can_be_an_error(workers: int) -> None:
    for make in (train, evaluation):
        with pytest.raises(ValueError, match=r"^number 7: torn$"):
            list(make(Numbers(broken=frozenset({7})), workers=workers, corrupt="fail", batch=40))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Numbers(broken=frozenset(range(40)))
    for make in (train, evaluation):
        with pytest.raises(ValueError, match=r"^none of the images is readable: number \d+: torn"):
            list(make(nothing, workers=workers))
    monkeypatch.setattr(module, "_MOST_IN_A_ROW", 5)
    with pytest.raises(ValueError, match="none of 5 images in a row is readable: number"):
        list(train(nothing, workers=workers))


class Failing:
    """A transform that fails at one image, in one way or another."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        if sample["image"][0, 0, 0] == 9:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("division by\nzero")
        return PLAIN(sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_are_sentences(workers: int) -> None:
    loader = train(Numbers(), Failing("raises"), workers=workers, batch=40)
    with pytest.raises(ValueError) as error:
        list(loader)
    assert str(error.value) == "number 9 cannot be transformed: ZeroDivisionError: division by zero"


def test_an_unforeseen_error_of_a_worker_says_how_to_see_more() -> None:
    class Torn(Numbers):
        def label(self, index: int) -> int:
            raise KeyError("torn")

    with pytest.raises(ValueError, match=r"^KeyError: 'torn' \(0 workers show where it comes"):
        list(train(Torn(), workers=1))
    with pytest.raises(KeyError):
        list(train(Torn()))


def test_a_worker_that_is_killed() -> None:
    with pytest.raises(ValueError, match="a worker that reads images has ended: .*worker"):
        list(train(Numbers(), Failing("killed"), workers=1, batch=40))


def test_damaged_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(12):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 7), (10 * i, 0, 0)).save(path)
    whole = (tmp_path / "a/0.png").read_bytes()
    for name, content in (("a/0", b""), ("a/2", b"text"), ("b/3", whole[:45]), ("b/5", bytes(99))):
        (tmp_path / f"{name}.png").write_bytes(content)
    transform = train_transform(Augment(), (6, 6), 3)
    loader = Loader(open_source(str(tmp_path), "all"), transform, batch=12, workers=1)
    with caplog.at_level(logging.WARNING):
        (batch,) = loader
    assert len(loader.unreadable) == 4 and len(batch["index"]) == 12
    assert all(reason.startswith(f"{name}: ") for name, reason in loader.unreadable.items())
    assert caplog.text.count("skipped") == 4
