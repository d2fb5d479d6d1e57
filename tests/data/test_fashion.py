"""The data that ships, and the check of the whole set."""

from __future__ import annotations

import gzip
import hashlib
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from foveate.data import CLASSES, fashion, fashion_mnist, fashion_mnist_mini, normalise


@pytest.mark.parametrize("part, each", [("train", 300), ("test", 200)])
def test_the_part_that_ships(part: str, each: int) -> None:
    images, labels = fashion_mnist_mini(part)
    assert images.shape == (10 * each, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [each] * len(CLASSES)
    floats = normalise(images)
    assert abs(floats.mean()) < 0.05 and abs(floats.std() - 1) < 0.05


def test_the_parts_do_not_overlap() -> None:
    train, test = (
        {row.numpy().tobytes() for row in fashion_mnist_mini(part).images}
        for part in ("train", "test")
    )
    assert not train & test


def test_what_ships_is_small_and_licensed() -> None:
    folder = files("foveate.data").joinpath("files")
    assert len(folder.joinpath("fashion_mnist_mini.npz.xz").read_bytes()) < 2_000_000
    assert "Zalando SE" in folder.joinpath("LICENSE.fashion-mnist").read_text()


def test_an_unknown_part() -> None:
    with pytest.raises(ValueError, match="part must be one of 'train', 'test'; got 'val'"):
        fashion_mnist_mini("val")


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the right form with other content, whose checksums are taken for right."""
    folder.mkdir(parents=True)
    digests = {}
    for name in fashion._DIGESTS:
        content = bytes(16) + bytes(range(4)) * 196 * 2
        if "labels" in name:
            content = bytes(8) + bytes([3, 5])
        (folder / name).write_bytes(gzip.compress(content))
        digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion, "_DIGESTS", digests)
    return folder


@pytest.mark.parametrize("inside", ["", "raw", "FashionMNIST/raw"])
def test_the_whole_set(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "set" / inside, monkeypatch)
    images, labels = fashion_mnist(tmp_path / "set", "test")
    assert images.shape == (2, 1, 28, 28) and labels.tolist() == [3, 5]
    assert images[0, 0, 0, :4].tolist() == [0, 1, 2, 3]
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="damaged or another file: its checksum is wrong"):
        fashion_mnist(tmp_path / "set")
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b half")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz is damaged"):
        fashion_mnist(tmp_path / "set")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="holds no t10k-labels-idx1-ubyte.gz"):
        fashion_mnist(tmp_path / "set")
