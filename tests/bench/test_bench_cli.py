"""The command line of ``foveate bench``, on a small model from a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from small import vit

import foveate
from foveate import machine
from foveate.cli import main
from foveate.measure.benchmark import closing, load, table_of


@pytest.fixture
def model(tmp_path: Path) -> str:
    reduced = foveate.apply(vit(img_size=16, depth=2).eval(), "evit(keep=0.5)")
    foveate.save(reduced, tmp_path / "small", everything=True)
    return str(tmp_path / "small")


def run(*words: object) -> int:
    return main(["bench", *map(str, words), "--threads", "1"])


def test_quick_run_writes_everything(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "new" / "r.json", tmp_path / "r.png"
    words = ("tome(r=1)", "--quick", "--batch", 2, "--rounds", 3, "--out", out, "--plot", plot)
    assert run(model, *words) == 0
    printed = capsys.readouterr().out
    assert "small, fp32, batch 2: 3 rounds of 1 calls" in printed
    assert "images: synthetic" in printed and "a trial, not a result" in printed
    assert "evit(keep=0.5)" in printed and "tome(r=1)" in printed
    assert f"wrote    {out}" in printed and plot.read_bytes().startswith(b"\x89PNG")
    saved = load(out)
    assert list(saved.about["cells"][0]["methods"]) == ["evit(keep=0.5)", "tome(r=1)"]
    assert saved.about["command"].startswith("foveate")
    assert main(["bench", "--compare", str(out), str(out)]) == 0
    assert "tome(r=1)" in capsys.readouterr().out


def test_methods_stand_anywhere(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--quick", "--batch=1", "tome(r=1)", "--rounds=1", "static") == 0
    printed = capsys.readouterr().out
    assert "tome(r=1)" in printed and "static" in printed


def test_images_of_the_user(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (60, 40)).save(tmp_path / "x.png")
    assert run(model, "--quick", "--rounds=1", "--images", tmp_path / "x.png") == 0
    assert "images: from files: 1, used again" in capsys.readouterr().out


def test_profile(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "tome(r=1)", "--profile", "--batch", 1) == 0
    assert "tome(r=1) against its oracle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL", "--rounds", 3), "a result needs at least 30 rounds, got 3"),
        (("MODEL", "evti"), "did you mean 'evit'"),
        (("MODEL", "--batch", 0), "batches must be whole numbers"),
        (("MODEL", "--device", "tpu"), "device must be auto, cpu"),
        (("MODEL", "--plot", "x.bmp"), "plots are written as .pdf, .png, .svg"),
        (("MODEL", "--images", "no"), "no does not exist"),
        (("MODEL", "--profile"), "explains one METHOD"),
        (("no_such_model",), "no_such_model is neither a file"),
        ((), "name a MODEL"),
        (("MODEL", "--compare", "x"), "leave MODEL and METHOD out"),
        (("--compare", "no.json"), "no.json does not exist"),
    ],
)
def test_mistakes_are_one_sentence(
    words: tuple[object, ...], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(model if word == "MODEL" else word for word in words)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("foveate bench: ")
    assert not any("Traceback" in line for line in said)


@pytest.fixture
def detector(tmp_path: Path) -> str:
    parts = {"name": "pyramid", "scales": [1, 0.5], "channels": 8}, {"name": "fpn", "channels": 8}
    model = foveate.dense.make_dense(vit(img_size=16, depth=2), ["a"], *parts, None)
    foveate.save(model, tmp_path / "dense")
    return str(tmp_path / "dense")


def test_a_dense_model_is_timed_as_backbone_and_as_a_whole(
    detector: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are brought to one size, whose cells all have a token; the network has no oracle."""
    from PIL import Image

    for number, size in enumerate([(61, 45), (30, 80)]):
        Image.effect_noise(size, 90).save(tmp_path / f"{number}.png")
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    words = ("svit", "tome(r=0.1)", "--quick", "--batch", 2, "--out", out, "--plot", plot)
    assert run(detector, *words, "--images", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "dense backbone, fp32, batch 2: 3 rounds" in printed
    assert "dense network, fp32, batch 2: 3 rounds" in printed
    assert "from files, cut and resized to 45 x 61: 2, used again" in printed
    assert "scaled and shifted to their target share: svit" in printed
    saved, plotted = load(out), plot.read_text()
    backbone, network = saved.about["cells"]
    assert backbone["methods"]["svit"]["oracle"] == "oracle of svit"
    assert network["methods"]["svit"]["oracle"] is None
    assert 0 < network["methods"]["svit"]["macs"] < 1
    assert backbone["methods"]["svit"]["macs"] < network["methods"]["svit"]["macs"]
    assert "tome(r=0.1)" in plotted
    assert main(["bench", "--compare", str(out)]) == 0
    assert "dense network, fp32, batch 2" in capsys.readouterr().out


def test_a_dense_model_of_any_size_needs_images(
    detector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(detector, "svit", "--quick") == 2
    assert "takes images of any size" in capsys.readouterr().err
    assert run(detector, "svit", "--quick", "--compile") == 2
    assert "dense models are timed eagerly" in capsys.readouterr().err


# Malloc ------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Environments that a program was started anew with."""
    found: list[dict[str, str]] = []
    for name in machine._MALLOC:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "execve", lambda path, words, env: found.append(dict(env)))
    return found


def test_the_program_starts_itself_again_once(
    started: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/bin/foveate", raising=False)
    machine.tune_malloc("cpu")
    assert len(started) == 1 and machine._MALLOC.items() <= started[0].items()
    assert "".join(capsys.readouterr()) == ""  # nobody need know
    for name, value in machine._MALLOC.items():
        monkeypatch.setenv(name, value)
    machine.tune_malloc("cpu")
    assert len(started) == 1 and machine.facts("cpu")["malloc_tuned"]


def test_other_programs_and_devices_are_left_alone(
    started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.tune_malloc("cpu")  # in a process of pytest
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/bin/foveate", raising=False)
    machine.tune_malloc("cuda")
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so")
    machine.tune_malloc("cpu")
    assert started == [] and machine.malloc_untuned("cpu") == {}


def test_the_library_says_that_malloc_is_not_tuned(
    started: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    options: dict = dict(batches=(1,), rounds=1, sample_ms=0.0, quick=True)
    found = foveate.bench.speed(vit(img_size=16, depth=2).eval(), **options)
    assert "malloc is not tuned" in caplog.text
    assert any("malloc was not tuned" in line for line in closing(table_of(found)))
