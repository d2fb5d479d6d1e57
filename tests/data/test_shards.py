"""Tar shards: every image by its position, and every cut found."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from samples import png, red

from foveate.data import NoSplit, open_source
from foveate.data.sources import shards


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, numbers: range) -> Path:
    members: dict[str, bytes] = {}
    for n in numbers:
        members[f"d/{n:04}.png"] = png(n)
        if n % 2:
            members[f"d/{n:04}.cls"] = str(n % 3).encode()
        else:
            members[f"d/{n:04}.json"] = json.dumps({"label": n % 3, "text": "x"}).encode()
    return write_tar(path, members)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for i in range(3):
        shard(tmp_path / f"train-{i:03}.tar", range(4 * i, 4 * i + 4))
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{split}-{000..002}.tar", "/train-00{0,1,2}.*"])
def test_shards(pattern: str, three: Path) -> None:
    split = "train" if "{split}" in pattern else "all"
    source = open_source(f"shards:{three}{pattern}", split)
    other = {"train": "all", "all": "train"}[split]
    with pytest.raises(NoSplit, match=f"there is no split '{other}'"):
        open_source(f"shards:{three}{pattern}", other)
    assert source.content(5) == png(5) and source.sizes()[5] == len(png(5))
    assert len(source) == 12 and source.classes == ("0", "1", "2")
    assert [red(source, i) for i in (11, 0, 5, 6)] == [11, 0, 5, 6]
    assert [source.label(i) for i in range(12)] == [i % 3 for i in range(12)]
    assert source.name(5) == f"{three}/train-001.tar: d/0005.png"


def test_shards_go_to_other_processes_without_their_open_files(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"shards:{three}", "all")
    source.image(0)
    same = pickle.loads(pickle.dumps(source))
    assert isinstance(same, shards.ShardSource) and same.files._open == {}
    assert [red(same, i) for i in range(12)] == list(range(12))
    # After a fork the position in an open file would be shared: another process opens its own.
    before = source.files._open[0]  # type: ignore[attr-defined]
    monkeypatch.setattr(shards.os, "getpid", lambda: -7)
    source.image(0)
    assert before.closed and source.files._open[0] is not before  # type: ignore[attr-defined]


def test_only_some_shards_stay_open(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MOST_OPEN", 2)
    source = open_source(f"shards:{three}", "all")
    for i in (0, 4, 0, 8):
        assert red(source, i) == i
    assert list(source.files._open) == [0, 2]  # type: ignore[attr-defined]


def test_shards_of_both_splits_with_named_classes(three: Path) -> None:
    shard(three / "val-000.tar", range(2))
    (three / "classes.txt").write_text("ant\nbee\ncow\n")
    val = open_source(f"shards:{three}/{{split}}-*.tar", "val")
    assert len(val) == 2 and val.classes == ("ant", "bee", "cow")
    (three / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match=r"d/0002\.png has the label 2, .*classes\.txt 2 names"):
        open_source(f"shards:{three}/train-*.tar", "all")
    with pytest.raises(NoSplit, match=r"there are no shards .*test-\*.tar, for the split 'test'"):
        open_source(f"shards:{three}/{{split}}-*.tar", "test")


def test_shards_without_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.webp": png(2), "about.json": b"{}"})
    source = open_source(f"shards:{tmp_path}", "all", labels=False)
    assert source.classes is None and [source.label(i) for i in range(2)] == [-1, -1]
    assert red(source, 1) == 2


ONE = {"1.png": png(1)}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (ONE, r"a\.tar: 1 has no label, neither 1\.cls nor 1\.json"),
        ({**ONE, "1.cls": b"cat"}, r"a\.tar: 1\.cls holds no label"),
        ({**ONE, "1.cls": b"-1"}, r"the label in 1\.cls must be a class from 0, got -1"),
        ({**ONE, "1.cls": b"1.5"}, r"the label in 1\.cls must be a class from 0, got 1\.5"),
        ({**ONE, "1.json": b'{"lable": 3}'}, r"a\.tar: 1\.json holds no label"),
        ({**ONE, "1.json": b"\xff\xfe{"}, r"a\.tar: 1\.json holds no label"),
        ({**ONE, "1.cls": b"0", "1.jpg": b""}, r"two images of one key: 1\.png, 1\.jpg"),
        ({**ONE, "1.cls": b"0", "2.cls": b"0"}, r"2\.cls has no image beside it"),
        ({"a.txt": b"text"}, "holds no images"),
    ],
)
def test_shards_that_hold_the_wrong_things(members: dict, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message) as error:
        open_source(f"shards:{tmp_path}/a.tar", "all")
    assert "\n" not in str(error.value)


def test_a_cut_shard_is_found_wherever_it_was_cut(tmp_path: Path) -> None:
    """Readers of tar take some cuts for the end: images would be missing and nobody the wiser."""
    whole = shard(tmp_path / "whole.tar", range(4)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        end = max(m.offset_data + (m.size + 511) // 512 * 512 for m in tar)
    cut = tmp_path / "cut.tar"
    for length in [*range(1, end, 100), *range(512, end + 1, 512)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar is (cut short|damaged)") as error:
            open_source(f"shards:{cut}", "all")
        assert "\n" not in str(error.value)
    cut.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])  # a header in the middle
    with pytest.raises(ValueError, match=r"cut\.tar is cut short or damaged after d/0000"):
        open_source(f"shards:{cut}", "all")
    cut.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut\.tar is (cut short|damaged)"):
        open_source(f"shards:{cut}", "all")


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_shards_are_refused(mode: str, name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {**ONE, "1.cls": b"0"}, mode)
    with pytest.raises(ValueError, match=rf"a\.tar is compressed \({name}\): unpack it"):
        open_source(f"shards:{tmp_path}/a.tar", "all")


def test_a_damaged_image_in_a_shard_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": png(1)[:45], "1.cls": b"0"})
    source = open_source(f"shards:{tmp_path}", "all")
    with pytest.raises(ValueError, match=r"a\.tar: 1\.png: "):
        source.image(0)
    (tmp_path / "a.tar").unlink()
    gone = pickle.loads(pickle.dumps(source))
    with pytest.raises(ValueError, match=r"a\.tar: 1\.png: .*No such file"):
        gone.image(0)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/{000..003}.tar", r"there are no shards .*/000\.tar"),
        ("/*.tar", "there are no shards"),
        ("/{3..1}.tar", "range {3..1} of shards runs backwards"),
        ("/{spilt}.tar", r"cannot read {spilt}: shards go as {000\.\.012}, {a,b} or {split}"),
    ],
)
def test_patterns_of_shards_that_are_wrong(pattern: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(f"shards:{tmp_path}{pattern}", "all")
